"""What one PPO step reports: numbers for the curves, and rollouts for people to read."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from tulu_lightning.core.advantages import explained_variance
from tulu_lightning.core.kl import k1, k2, k3
from tulu_lightning.core.policy import PolicyTerms, ValueTerms
from tulu_lightning.rollout.experience import Experience, Group
from tulu_lightning.rollout.scoring import response_text
from tulu_lightning.types import Outcome

__all__ = ["Epochs", "step_metrics", "table"]


class Epochs:
    """Sums over all epochs and mini-batches of one step; a step of critic warm-up leaves the policy's at 0."""

    def __init__(self) -> None:
        self.policy = torch.zeros(4, dtype=torch.float64)  # loss, ratio, clipped, tokens
        self.value = torch.zeros(3, dtype=torch.float64)  # loss, clipped, tokens
        self.ratio_max = 1.0
        self.first_ratio_error = 0.0
        self.grad_norms: list[float] = []
        self.critic_grad_norms: list[float] = []

    def add_policy(self, terms: PolicyTerms) -> None:
        """Count one micro-batch of the policy's loss."""
        if not self.grad_norms:  # no update yet: the policy is the one that the old log-probs are of
            self.first_ratio_error = max(self.first_ratio_error, float((terms.ratio_N - 1).abs().max()))
        self.ratio_max = max(self.ratio_max, float(terms.ratio_N.max()))
        sums = (terms.loss_N.detach().sum(), terms.ratio_N.sum(), terms.clipped_N.sum(), terms.loss_N.numel())
        self.policy += torch.tensor([float(x) for x in sums], dtype=torch.float64)

    def add_value(self, terms: ValueTerms) -> None:
        """Count one micro-batch of the critic's loss."""
        sums = (terms.loss_N.detach().sum(), terms.clipped_N.sum(), terms.loss_N.numel())
        self.value += torch.tensor([float(x) for x in sums], dtype=torch.float64)

    def metrics(self) -> dict[str, float]:
        """Means over tokens and epochs."""
        loss, ratio, clipped, tokens = self.policy.tolist()
        value_loss, value_clipped, value_tokens = self.value.tolist()
        return {
            "policy_loss": loss / max(tokens, 1),
            "ratio_mean": ratio / tokens if tokens else 1.0,
            "ratio_max": self.ratio_max,
            "first_ratio_error": self.first_ratio_error,
            "clip_share": clipped / max(tokens, 1),
            "value_loss": value_loss / max(value_tokens, 1),
            "value_clip_share": value_clipped / max(value_tokens, 1),
            "grad_norm": _mean(self.grad_norms),
            "critic_grad_norm": _mean(self.critic_grad_norms),
        }


def step_metrics(groups: Sequence[Group], experience: Sequence[Experience], epochs: Epochs) -> dict[str, float]:
    """All numbers of one step but its seconds."""
    completions = [c for g in groups for c in g.completions]
    verdicts = [v for g in groups for v in g.verdicts]
    outcomes = Counter(v.outcome for v in verdicts)
    old_N, reference_N, sampler_N, values_N, returns_N, entropy_N = (
        torch.cat(x)
        for x in zip(
            *((e.old_N, e.reference_N, e.micro.sampler_N, e.values_N, e.returns_N, e.entropy_N) for e in experience),
            strict=True,
        )
    )
    metrics = epochs.metrics()
    return {
        "loss": metrics["policy_loss"],
        "reward": _mean([r for g in groups for r in g.rewards]),
        "score": _mean([v.score for v in verdicts]),
        "length": _mean([float(c.ids_L.numel()) for c in completions]),
        "stop_share": _mean([float(c.finish == "stop") for c in completions]),
        "kl": float(k1(old_N, reference_N).mean()),
        "k2": float(k2(old_N, reference_N).mean()),
        "k3": float(k3(old_N, reference_N).mean()),
        "entropy": float(entropy_N.mean()),
        "explained_variance": explained_variance(values_N, returns_N),
        "value_mean": float(values_N.mean()),
        "mismatch_kl": float(k3(sampler_N, old_N).mean()),
        "mismatch_max": float((sampler_N - old_N).abs().max()),
        **{f"outcome_{name}": float(outcomes[name]) for name in get_args(Outcome)},
        **metrics,
        "tokens": float(sum(e.micro.pack.tokens_T.numel() for e in experience)),
        "trained_tokens": float(old_N.numel()),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def table(groups: Sequence[Group], experience: Sequence[Experience], tokenizer: Any) -> list[dict[str, Any]]:
    """Every rollout of the step as a row for people: prompt, response, verdict, reward, mean advantage."""
    advantages = _advantages(experience)
    rows = []
    for index, group in enumerate(groups):
        for sample, completion in enumerate(group.completions):
            rows.append(
                {
                    "row": group.prompt.row,
                    "prompt": group.prompt.text,
                    "response": response_text(completion, tokenizer),
                    "target": group.prompt.target,
                    "outcome": group.verdicts[sample].outcome,
                    "score": group.verdicts[sample].score,
                    "reward": group.rewards[sample],
                    "advantage": advantages[index][sample],
                    "tokens": completion.ids_L.numel(),
                    "finish": completion.finish,
                    "ids": completion.ids_L.tolist(),
                    "version": completion.version,
                }
            )
    return rows


def _advantages(experience: Sequence[Experience]) -> dict[int, list[float]]:
    """Mean advantage of each response, by group."""
    result: dict[int, list[float]] = {}
    for e in experience:
        means: list[Tensor] = [part.mean() for part in e.advantages_N.split(list(e.micro.lengths_R))]
        for group, mean in zip(e.micro.group, means, strict=True):
            result.setdefault(group, []).append(float(mean))
    return result
