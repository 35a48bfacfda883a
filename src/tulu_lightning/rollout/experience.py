"""From rollouts to what PPO trains on: packs, and one number per response token for each thing PPO knows.

A prompt and the responses sampled from it are one document: the prompt's tokens are computed once. Every per-token
array is in the pack's own order of scored tokens, which is prompts, responses, tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tulu_lightning.core.advantages import gae, token_rewards
from tulu_lightning.core.packing import length, pack
from tulu_lightning.core.step_plan import cut
from tulu_lightning.types import Completion, Document, Pack, Prompt, Segment, Verdict

__all__ = ["Experience", "Group", "Micro", "estimate", "micro_batches", "reward"]


class Group(NamedTuple):
    """One prompt with the responses sampled from it."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    verdicts: tuple[Verdict, ...]
    rewards: tuple[float, ...]
    """Terminal reward of each response."""


class Micro(NamedTuple):
    """One micro-batch of responses before anything was computed of it."""

    pack: Pack
    scores_R: Tensor
    """float32, terminal rewards."""
    sampler_N: Tensor
    """float32, the sampler's own log-probs."""
    lengths_R: tuple[int, ...]
    group: tuple[int, ...]
    """Index of each response's group in the step."""


class Experience(NamedTuple):
    """One micro-batch with everything that stays fixed while the step's epochs run. All float32, per token."""

    micro: Micro
    old_N: Tensor
    """Log-probs under the policy at the start of the step, from the trainer itself: the first ratio is exactly 1."""
    reference_N: Tensor
    values_N: Tensor
    entropy_N: Tensor
    advantages_N: Tensor
    returns_N: Tensor


def reward(verdict: Verdict, completion: Completion, right: float, no_stop: float) -> float:
    """Terminal reward: `right` times the verifier's score, replaced by `no_stop` where the response was cut.

    Tülu 3 (section 6.2): 10 or 0, and -10 without an end-of-sequence token. "Stopped" is the engine's finish reason,
    not the identity of the last token.
    """
    return right * verdict.score if completion.finish == "stop" else no_stop


def document(group: Group) -> Document:
    """The prompt as context with one scored child per response."""
    prompt_L = torch.tensor(group.prompt.ids)
    children = (Segment(c.ids_L, torch.ones(c.ids_L.numel()), 0) for c in group.completions)
    return Document((Segment(prompt_L, torch.zeros(prompt_L.numel())), *children))


def micro_batches(groups: Sequence[Group], indices: Sequence[int], micro_tokens: int) -> list[Micro]:
    """Cut some of the step's groups into packs of at most `micro_tokens` tokens.

    Args:
        groups: all groups of the step.
        indices: those of one mini-batch.
        micro_tokens: limit of a pack, in tokens.
    """
    documents = [document(groups[i]) for i in indices]
    result = []
    for items in cut([length(d) for d in documents], micro_tokens)[0]:
        chosen = [groups[indices[i]] for i in items]
        completions = [c for group in chosen for c in group.completions]
        result.append(
            Micro(
                pack=pack([documents[i] for i in items], [group.prompt.row for group in chosen]),
                scores_R=torch.tensor([r for group in chosen for r in group.rewards], dtype=torch.float32),
                sampler_N=torch.cat([c.logprobs_L for c in completions]).float(),
                lengths_R=tuple(c.ids_L.numel() for c in completions),
                group=tuple(indices[i] for i in items for _ in groups[indices[i]].completions),
            )
        )
    return result


def estimate(
    micro: Micro,
    old_N: Tensor,
    reference_N: Tensor,
    values_N: Tensor,
    entropy_N: Tensor,
    kl_coefficient: float,
    gamma: float,
    lam: float,
) -> Experience:
    """Token rewards, advantages (not yet whitened: that is over the whole batch) and returns of one micro-batch."""
    rewards_N = token_rewards(micro.scores_R, old_N, reference_N, micro.lengths_R, kl_coefficient)
    advantages_N, returns_N = gae(rewards_N, values_N, micro.lengths_R, gamma, lam)
    return Experience(micro, old_N, reference_N, values_N, entropy_N, advantages_N, returns_N)
