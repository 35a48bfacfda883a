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
    """`-min(ρ A, clip(ρ, 1 - ε_low, 1 + ε_high) A)` with ρ = exp(log π_θ - log π_old)."""

    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        require(0 < self.clip_low <= 1, "policy_loss.clip_low", self.clip_low, "It must be above 0 and at most 1.")
        require(self.clip_high > 0, "policy_loss.clip_high", self.clip_high, "It must be above 0.")

    def __call__(self, logp_N: Tensor, old_N: Tensor, advantages_N: Tensor) -> PolicyTerms:
        """Loss per token from the log-probs of the sampled tokens now and at the start of the step."""
        ratio_N = torch.exp((logp_N - old_N).clamp(-LOG_LIMIT, LOG_LIMIT))
        free_N = -ratio_N * advantages_N
        held_N = -ratio_N.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages_N
        return PolicyTerms(torch.maximum(free_N, held_N), ratio_N.detach(), held_N > free_N)


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
