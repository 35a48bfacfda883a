"""What one PPO step reports: numbers for the curves, and rollouts for people to read."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from tulu_lightning.core.advantages import explained_variance
from tulu_lightning.core.kl import k1, k2, k3
from tulu_lightning.core.policy import PolicyTerms, ValueTerms
from tulu_lightning.rollout.experience import Experience, has_signal, over_responses
from tulu_lightning.rollout.scoring import response_text
from tulu_lightning.stages.collect import Collected
from tulu_lightning.types import Outcome

__all__ = ["Epochs", "rollout_metrics", "table", "token_metrics"]


class Epochs:
    """Sums over all epochs and mini-batches of one step; a step of critic warm-up leaves the policy's at 0."""

    def __init__(self) -> None:
        self.policy = torch.zeros(4, dtype=torch.float64)  # loss, ratio, clipped, tokens
        self.value = torch.zeros(3, dtype=torch.float64)  # loss, clipped, tokens
        self.loss = 0.0
        self.ratio_max = 1.0
        self.first_ratio_error = 0.0
        self.grad_norms: list[float] = []
        self.critic_grad_norms: list[float] = []

    def add_policy(self, terms: PolicyTerms, loss: float) -> None:
        """Count one micro-batch of the policy's loss, and its part in the whole that is minimised."""
        if not terms.ratio_N.numel():
            return
        if not self.grad_norms:  # no update yet: the policy is the one that the old log-probs are of
            self.first_ratio_error = max(self.first_ratio_error, float((terms.ratio_N - 1).abs().max()))
        self.ratio_max = max(self.ratio_max, float(terms.ratio_N.max()))
        sums = (terms.loss_N.detach().sum(), terms.ratio_N.sum(), terms.clipped_N.sum(), terms.loss_N.numel())
        self.policy += torch.tensor([float(x) for x in sums], dtype=torch.float64)
        self.loss += loss

    def add_value(self, terms: ValueTerms) -> None:
        """Count one micro-batch of the critic's loss."""
        sums = (terms.loss_N.detach().sum(), terms.clipped_N.sum(), terms.loss_N.numel())
        self.value += torch.tensor([float(x) for x in sums], dtype=torch.float64)

    def plus(self, others: Sequence["Epochs"]) -> "Epochs":
        """Together with those of other ranks; gradient norms are of all of them already."""
        result = Epochs()
        for one in (self, *others):
            result.policy, result.value = result.policy + one.policy, result.value + one.value
            result.loss += one.loss
            result.ratio_max = max(result.ratio_max, one.ratio_max)
            result.first_ratio_error = max(result.first_ratio_error, one.first_ratio_error)
        result.grad_norms, result.critic_grad_norms = self.grad_norms, self.critic_grad_norms
        return result

    def metrics(self) -> dict[str, float]:
        """Means over tokens and epochs; `loss` is what was minimised, with its KL and entropy terms and its weights."""
        loss, ratio, clipped, tokens = self.policy.tolist()
        value_loss, value_clipped, value_tokens = self.value.tolist()
        metrics = {
            "loss": self.loss / max(len(self.grad_norms), 1),
            "policy_loss": loss / max(tokens, 1),
            "ratio_mean": ratio / tokens if tokens else 1.0,
            "ratio_max": self.ratio_max,
            "first_ratio_error": self.first_ratio_error,
            "clip_share": clipped / max(tokens, 1),
            "grad_norm": _mean(self.grad_norms),
        }
        if value_tokens:
            metrics["value_loss"] = value_loss / value_tokens
            metrics["value_clip_share"] = value_clipped / value_tokens
            metrics["critic_grad_norm"] = _mean(self.critic_grad_norms)
        return metrics


def rollout_metrics(collected: Collected) -> dict[str, float]:
    """Numbers of everything that was sampled, before anything was left out: a curve of the rest would lie."""
    raw = collected.raw
    completions = [c for g in raw for c in g.completions]
    verdicts = [v for g in raw for v in g.verdicts]
    outcomes = Counter(v.outcome for v in verdicts)
    metrics = {
        "reward": _mean([r for g in raw for r in g.rewards]),
        "score": _mean([v.score for v in verdicts]),
        "pass_rate_raw": outcomes["right"] / max(len(verdicts), 1),
        "length": _mean([float(c.ids_L.numel()) for c in completions]),
        "stop_share": _mean([float(c.finish == "stop") for c in completions]),
        **{f"outcome_{name}": float(outcomes[name]) for name in get_args(Outcome)},
        "responses": float(len(completions)),
        "trained_responses": float(sum(len(g.kept) for g in collected.groups)),
        "version": float(collected.version),
    }
    if any(len(g.completions) > 1 for g in raw):
        metrics["zero_signal_share"] = _mean([float(not has_signal(g)) for g in raw])
    if collected.refills or len(collected.groups) < len(raw):
        metrics["refills"] = float(collected.refills)
        metrics["pass_rate_trained"] = _mean(
            [float(g.verdicts[i].outcome == "right") for g in collected.groups for i in g.kept]
        )
    for source in sorted({g.prompt.source for g in raw} - {""}):
        metrics[f"score/{source}"] = _mean([v.score for g in raw if g.prompt.source == source for v in g.verdicts])
    return metrics


def token_metrics(experience: Sequence[Experience]) -> dict[str, float]:
    """Numbers of the tokens that were learned from; only those that they allow: no KL without a reference.

    Without those of groups that were not computed, since they teach nothing; `trained_tokens` counts them.
    """
    trained = float(sum(e.old_N.numel() for e in experience))
    experience = [e for e in experience if e.known]
    metrics = {"tokens": float(sum(e.micro.pack.tokens_T.numel() for e in experience)), "trained_tokens": trained}
    if not experience:
        return metrics
    metrics["entropy"] = float(_joined([e.entropy_N for e in experience]).mean())
    if experience[0].reference_N is not None:
        old_N, reference_N = _joined([e.old_N for e in experience]), _joined([e.reference_N for e in experience])
        metrics |= {"kl": float(k1(old_N, reference_N).mean())}
        metrics |= {"k2": float(k2(old_N, reference_N).mean()), "k3": float(k3(old_N, reference_N).mean())}
        sums_R = over_responses(k1(old_N, reference_N), [n for e in experience for n in e.micro.lengths_R])
        metrics["kl_response"] = float(sums_R.mean())
    if experience[0].values_N is not None:
        values_N, returns_N = _joined([e.values_N for e in experience]), _joined([e.returns_N for e in experience])
        metrics["explained_variance"] = explained_variance(values_N, returns_N)
        metrics["value_mean"] = float(values_N.mean())
    return metrics


def _joined(parts: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([part for part in parts if part is not None])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def table(collected: Collected, experience: Sequence[Experience], tokenizer: Any) -> list[dict[str, Any]]:
    """Every rollout of the step as a row for people: prompt, response, verdict, reward, mean advantage."""
    means = _advantages(experience)
    place = {id(group): index for index, group in enumerate(collected.groups)}
    return [
        {
            "row": group.prompt.row,
            "source": group.prompt.source,
            "prompt": group.prompt.text,
            "response": response_text(completion, tokenizer),
            "target": group.prompt.target,
            "outcome": group.verdicts[sample].outcome,
            "score": group.verdicts[sample].score,
            "reward": group.rewards[sample],
            "advantage": means.get((place.get(id(group), -1), sample)),
            "tokens": completion.ids_L.numel(),
            "finish": completion.finish,
            "ids": completion.ids_L.tolist(),
            "version": completion.version,
        }
        for group in collected.raw
        for sample, completion in enumerate(group.completions)
    ]


def _advantages(experience: Sequence[Experience]) -> dict[tuple[int, int], float]:
    """Mean advantage of each response that was learned from, by its group and its place there."""
    return {
        place: float(part.mean())
        for e in experience
        for place, part in zip(e.micro.places, e.advantages_N.split(list(e.micro.lengths_R)), strict=True)
    }
