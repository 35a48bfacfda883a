"""The choice of an advantage: PPO's, which needs a critic, or one of the group's, which do not."""

from dataclasses import dataclass

from tulu_lightning.core.groups import GRPO, RLOO, Advantage, DrGRPO, GroupAdvantage, ReinforcePlusPlus
from tulu_lightning.core.settings import require

__all__ = ["GAE", "GRPO", "RLOO", "Advantage", "DrGRPO", "GroupAdvantage", "ReinforcePlusPlus", "needs_critic"]


@dataclass(frozen=True)
class GAE(Advantage):
    """Settings of `core.advantages.gae` (Schulman et al. 2016); the defaults are Tülu 3's (table 21)."""

    gamma: float = 1.0
    """Discount γ, from 0 to 1."""
    lam: float = 0.95
    """λ, from 0 to 1. 1 leaves the critic out of all but the baseline: less bias where the critic is weak."""
    whiten: bool = True
    """Whiten the advantages over the tokens of the global batch; returns never are."""

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"advantage.{name}", value, "It lies between 0 and 1.")

    @property
    def whiten_batch(self) -> bool:
        """`whiten`."""
        return self.whiten


def needs_critic(advantage: Advantage) -> bool:
    """Whether a value network has to be trained beside the policy: for GAE only."""
    return isinstance(advantage, GAE)
