"""AdamW and its schedule, as settings."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from tulu_lightning.core.schedules import ScheduleName, lr_factor
from tulu_lightning.core.settings import require

__all__ = ["AdamW"]


@dataclass(frozen=True)
class AdamW:
    """Settings of one AdamW; betas, eps and decay default to torch's and the paper's."""

    lr: float
    """Peak learning rate."""
    schedule: ScheduleName = "linear"
    warmup_ratio: float = 0.0
    """Share of all steps over which the rate rises."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm when theirs is larger; 0 switches clipping off."""

    def __post_init__(self) -> None:
        require(0 < self.lr < float("inf"), "optimizer.lr", self.lr, "It must be above 0.")
        for name in ("warmup_ratio", "beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}", value, "It is a share: 0 to below 1.")
        require(0 < self.eps < float("inf"), "optimizer.eps", self.eps, "It must be above 0.")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            require(0 <= value < float("inf"), f"optimizer.{name}", value, "It must be 0 or more.")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        """The optimiser; fused, which on CPU is several times as fast as the default."""
        return torch.optim.AdamW(
            [p for p in parameters if p.requires_grad],
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,
        )

    def lr_at(self, step: int, total_steps: int) -> float:
        """Learning rate of global step `step`."""
        return self.lr * lr_factor(step, total_steps, self.schedule, self.warmup_ratio)
