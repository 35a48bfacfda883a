"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

import math
from typing import Literal

__all__ = ["ScheduleName", "lr_factor"]

ScheduleName = Literal["linear", "cosine", "constant"]


def lr_factor(step: int, total_steps: int, schedule: ScheduleName = "linear", warmup_ratio: float = 0.0) -> float:
    """What the peak learning rate is multiplied by at `step` (from 0) of `total_steps`.

    Warm-up rises linearly over ceil(warmup_ratio · total) steps and its first step is not 0; then linear or cosine
    decay reaches 0 one step after the last, or the rate stays.

    Example: total 4, linear, no warm-up: 1, 0.75, 0.5, 0.25.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total_steps - warmup)
    if schedule == "linear":
        return max(0.0, 1.0 - done)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return 1.0
