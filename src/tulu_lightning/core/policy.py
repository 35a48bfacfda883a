"""PPO's two clipped losses, per token (Schulman et al. 2017, eq. 7; Tülu 3, section 6.2).

They return one number per token and nothing is averaged here: the stage sums and divides once, by the tokens of the
whole mini-batch over all ranks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tulu_lightning.core.kl import LOG_LIMIT
from tulu_lightning.core.settings import require

__all__ = ["ClippedPolicy", "ClippedValue", "PolicyTerms", "ValueTerms"]


class PolicyTerms(NamedTuple):
    """Per token."""

    loss_N: Tensor
    ratio_N: Tensor
    """π_θ / π_old, detached."""
    clipped_N: Tensor
    """bool: the clipped branch was the one taken, so the token gives no gradient."""


@dataclass(frozen=True)
class ClippedPolicy:
    """`-min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A)` with ρ = exp(log π_θ - log π_old).

    With different ends it is DAPO's "clip higher" (Yu et al. 2025, arXiv 2503.14476, eq. 8). With `dual_clip` c, the loss
    of a token with A < 0 is at most -c A (Ye et al. 2020, arXiv 1912.09729): unclipped, it grows with ρ without
    end. On advantages that are the same for all tokens of a response it is GRPO's loss.
    """

    clip_low: float = 0.2
    """ε_low."""
    clip_high: float = 0.2
    """ε_high."""
    dual_clip: float | None = None
    """c, above 1; null leaves the loss of A < 0 unbounded, as in the papers of PPO and Tülu 3. 3 is usual."""

    def __post_init__(self) -> None:
        require(0 < self.clip_low <= 1, "policy_loss.clip_low", self.clip_low, "It must be above 0 and at most 1.")
        require(self.clip_high > 0, "policy_loss.clip_high", self.clip_high, "It must be above 0.")
        if self.dual_clip is not None:
            remedy = "It bounds ratios above 1: use more than 1, or null."
            require(1 < self.dual_clip < float("inf"), "policy_loss.dual_clip", self.dual_clip, remedy)

    def __call__(self, logp_N: Tensor, old_N: Tensor, advantages_N: Tensor) -> PolicyTerms:
        """Loss per token from the log-probs of the sampled tokens now and at the start of the step."""
        ratio_N = torch.exp((logp_N - old_N).clamp(-LOG_LIMIT, LOG_LIMIT))
        free_N = -ratio_N * advantages_N
        held_N = -ratio_N.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages_N
        loss_N, clipped_N = torch.maximum(free_N, held_N), held_N > free_N
        if self.dual_clip is not None:
            # Below 0 nothing is bounded here: there A > 0.
            most_N = torch.where(advantages_N < 0, -self.dual_clip * advantages_N, float("inf"))
            clipped_N = clipped_N | (loss_N > most_N)
            loss_N = torch.minimum(loss_N, most_N)
        return PolicyTerms(loss_N, ratio_N.detach(), clipped_N)


class ValueTerms(NamedTuple):
    """Per token."""

    loss_N: Tensor
    clipped_N: Tensor
    """bool: the clipped error was the larger one."""


@dataclass(frozen=True)
class ClippedValue:
    """`½ max((V - R)², (V_clip - R)²)`, V_clip within ±clip of the value at the start of the step."""

    clip: float = 0.2

    def __post_init__(self) -> None:
        require(self.clip > 0, "value_loss.clip", self.clip, "It must be above 0.")

    def __call__(self, values_N: Tensor, old_N: Tensor, returns_N: Tensor) -> ValueTerms:
        """Loss per token. Units are those of the reward: clip 0.2 is small beside a reward of 10."""
        held_N = old_N + (values_N - old_N).clamp(-self.clip, self.clip)
        free_N, held_N = (values_N - returns_N).square(), (held_N - returns_N).square()
        return ValueTerms(0.5 * torch.maximum(free_N, held_N), held_N > free_N)
