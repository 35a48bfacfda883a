"""From rollouts to what PPO trains on: packs, and one number per response token for each thing PPO knows.

A prompt and the responses sampled from it are one document: the prompt's tokens are computed once. Every per-token
array is in the pack's own order of scored tokens, which is prompts, responses, tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tulu_lightning.core.advantages import gae, response_rewards, token_rewards
from tulu_lightning.core.estimators import GAE, GroupAdvantage
from tulu_lightning.core.overlong import Overlong
from tulu_lightning.core.packing import length, pack
from tulu_lightning.core.step_plan import cut
from tulu_lightning.types import Completion, Document, Pack, Prompt, Segment, Verdict

__all__ = ["Experience", "Group", "Micro", "advantages", "has_signal", "judged", "micro_batches", "over_responses"]


class Group(NamedTuple):
    """One prompt with the responses sampled from it, and what they are worth once they are judged."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    verdicts: tuple[Verdict, ...] = ()
    rewards: tuple[float, ...] = ()
    """Terminal reward of each response."""
    trained: tuple[bool, ...] = ()
    """Whether each response is learned from: not one without a token, nor one that an over-long mask leaves out."""

    @property
    def kept(self) -> tuple[int, ...]:
        """Places of the responses that are learned from."""
        return tuple(i for i, kept in enumerate(self.trained) if kept)


class Micro(NamedTuple):
    """One micro-batch of responses before anything was computed of it."""

    pack: Pack
    scores_R: Tensor
    """float32, terminal rewards."""
    sampler_N: Tensor
    """float32, the sampler's own log-probs."""
    lengths_R: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    """Of each response: its group in the step, and its place in that group."""


class Experience(NamedTuple):
    """One micro-batch with everything that stays fixed while the step's epochs run. All float32, per token."""

    micro: Micro
    old_N: Tensor
    """Log-probs under the policy at the start of the step, from the trainer itself: the first ratio is exactly 1."""
    reference_N: Tensor | None
    """None where there is no KL term, and so no reference."""
    values_N: Tensor | None
    """None without a critic."""
    entropy_N: Tensor
    correction_N: Tensor
    """Importance weight of each token, for the engine that sampled it."""
    weight_N: Tensor
    """What each token's loss is multiplied by before it is summed."""
    advantages_N: Tensor
    returns_N: Tensor | None
    """None without a critic."""
    known: bool = True
    """Whether log-probs, entropy and correction are computed; else the update's own forward will (`Learner.one_pass`)."""


def judged(group: Group, verdicts: Sequence[Verdict], right: float, overlong: Overlong, max_new_tokens: int) -> Group:
    """The group with its verdicts, rewards, and which responses are learned from.

    A response earns `right` times the weighted mean score of its prompt's checks times the sum of their weights (Tülu 3,
    equation 8: 10 or 0 for a prompt with one check). Responses without a token have nothing to train: they leave
    before any baseline is computed.
    """
    rewards, trained = [], []
    for verdict, completion in zip(verdicts, group.completions, strict=True):
        stopped, length = completion.finish == "stop", completion.ids_L.numel()
        worth = right * group.prompt.weight * verdict.score
        rewards.append(overlong.reward(worth, length, max_new_tokens, stopped))
        trained.append(length > 0 and overlong.trained(stopped))
    return group._replace(verdicts=tuple(verdicts), rewards=tuple(rewards), trained=tuple(trained))


def has_signal(group: Group) -> bool:
    """Whether the rewards of the responses that are learned from differ: else a group's advantages are all 0."""
    return len({group.rewards[i] for i in group.kept}) > 1


def document(group: Group) -> Document:
    """The prompt as context with one scored child per response that is learned from."""
    prompt_L = torch.tensor(group.prompt.ids)
    chosen = [group.completions[i] for i in group.kept]
    children = (Segment(c.ids_L, torch.ones(c.ids_L.numel()), 0) for c in chosen)
    return Document((Segment(prompt_L, torch.zeros(prompt_L.numel())), *children))


def micro_batches(
    groups: Sequence[Group], indices: Sequence[int], micro_tokens: int, place: tuple[int, int] = (0, 1)
) -> list[Micro]:
    """Cut some of the step's groups into packs of at most `micro_tokens` tokens; one rank's share of them.

    All ranks get the same number of packs, since sharded networks gather in each: a rank that is short gets packs
    without a response.

    Args:
        groups: all groups of the step.
        indices: those of one mini-batch; one with nothing to learn from is left out.
        micro_tokens: limit of a pack, in tokens.
        place: rank and number of ranks.
    """
    indices = [i for i in indices if groups[i].kept]
    documents = [document(groups[i]) for i in indices]
    rank, ranks = place
    dealt = cut([length(d) for d in documents], micro_tokens, ranks)[rank] if documents else ()
    return [
        _micro(groups, [indices[i] for i in items], [documents[i] for i in items])
        if items
        else _empty(groups[indices[0]])
        for items in dealt
    ]


def _empty(group: Group) -> Micro:
    """A pack that computes and has nothing to learn from: a prompt."""
    prompt_L = torch.tensor(group.prompt.ids)
    alone = Document((Segment(prompt_L, torch.zeros(prompt_L.numel())),))
    return Micro(pack([alone], ()), torch.zeros(0), torch.zeros(0), (), ())


def _micro(groups: Sequence[Group], indices: Sequence[int], documents: Sequence[Document]) -> Micro:
    places = tuple((index, sample) for index in indices for sample in groups[index].kept)
    completions = [groups[index].completions[sample] for index, sample in places]
    return Micro(
        pack=pack(documents, [groups[index].prompt.row for index in indices]),
        scores_R=torch.tensor([groups[index].rewards[sample] for index, sample in places], dtype=torch.float32),
        sampler_N=torch.cat([c.logprobs_L for c in completions]).float(),
        lengths_R=tuple(c.ids_L.numel() for c in completions),
        places=places,
    )


def over_responses(x_N: Tensor, lengths_R: Sequence[int]) -> Tensor:
    """Sum of each response's tokens, float32 `[R]`."""
    if not lengths_R:
        return x_N.new_zeros(0, dtype=torch.float32)
    return torch.stack([part.sum() for part in x_N.float().split(list(lengths_R))])


def advantages(parts: Sequence[Experience], estimator: GAE | GroupAdvantage, kl_coefficient: float) -> list[Experience]:
    """Advantages (not yet whitened) and returns of all of a step's micro-batches.

    With a critic the k1 penalty is a reward of each token (`core.advantages.token_rewards`). A group's estimator knows
    whole responses only: the penalty of its tokens is taken off a response's score before the baseline.

    Args:
        parts: the step's micro-batches on this rank; a group's responses are all in one of them.
        estimator: which.
        kl_coefficient: β of the penalty in the reward; 0 where there is none.
    """
    if isinstance(estimator, GAE):
        return [_with_critic(e, estimator, kl_coefficient) for e in parts]
    if not any(e.micro.places for e in parts):
        return list(parts)
    scores_R = torch.cat([_penalised(e, kl_coefficient) for e in parts])
    group_R = torch.tensor([group for e in parts for group, _ in e.micro.places], device=scores_R.device)
    each_R = estimator(scores_R, group_R).split([len(e.micro.lengths_R) for e in parts])
    return [e._replace(advantages_N=_spread(e.micro, a_R)) for e, a_R in zip(parts, each_R, strict=True)]


def _with_critic(e: Experience, estimator: GAE, kl_coefficient: float) -> Experience:
    assert e.values_N is not None
    lengths_R = e.micro.lengths_R
    if not lengths_R:
        return e._replace(returns_N=torch.zeros_like(e.old_N))
    reference_N = e.old_N if e.reference_N is None else e.reference_N
    rewards_N = token_rewards(e.micro.scores_R, e.old_N, reference_N, lengths_R, kl_coefficient)
    advantages_N, returns_N = gae(rewards_N, e.values_N, lengths_R, estimator.gamma, estimator.lam)
    return e._replace(advantages_N=advantages_N, returns_N=returns_N)


def _penalised(e: Experience, kl_coefficient: float) -> Tensor:
    if e.reference_N is None or not kl_coefficient or not e.micro.lengths_R:
        return e.micro.scores_R
    return response_rewards(e.micro.scores_R, e.old_N, e.reference_N, e.micro.lengths_R, kl_coefficient)


def _spread(micro: Micro, each_R: Tensor) -> Tensor:
    if not micro.lengths_R:
        return each_R.new_zeros(0, dtype=torch.float32)
    return each_R.float().repeat_interleave(torch.tensor(micro.lengths_R, device=each_R.device))
