"""PPO's settings in groups: the critic, the sampling, the reward."""

import math
from dataclasses import dataclass
from typing import Literal

from tulu_lightning.core.settings import require
from tulu_lightning.stages.optimizer import AdamW

__all__ = ["Critic", "Reward", "Rollout"]


@dataclass(frozen=True)
class Critic:
    """The value network: separate from the policy, with an optimiser of its own."""

    optimizer: AdamW
    path: str | None = None
    """Folder to start from; the policy's own start when null. Any size with the policy's tokenizer will do (Tülu 3's
    70B policy had an 8B critic). A reward model's export brings its head, as Tülu 3's critics did; a language model
    gets a fresh one."""
    layers: int | None = None
    """Keep only the first so many decoder layers; not of a reward model, whose head reads the last one."""
    warmup_steps: int = 0
    """Steps at the start in which only the critic learns; a fresh head needs some. They count as steps of the policy's
    schedule too: its rate has decayed by that much when it starts."""

    def __post_init__(self) -> None:
        if self.layers is not None:
            require(self.layers >= 1, "critic.layers", self.layers, "Use at least 1, or null to keep them all.")
        require(self.warmup_steps >= 0, "critic.warmup_steps", self.warmup_steps, "Use 0 or more.")


@dataclass(frozen=True)
class Rollout:
    """How responses are sampled."""

    max_new_tokens: int
    samples_per_prompt: int = 1
    temperature: float = 1.0
    engine_dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples_per_prompt"):
            require(getattr(self, name) >= 1, f"rollout.{name}", getattr(self, name), "Use at least 1.")
        remedy = "It must be above 0: greedy responses teach nothing."
        require(0 < self.temperature < float("inf"), "rollout.temperature", self.temperature, remedy)
        known = self.engine_dtype in ("float32", "bfloat16")
        require(known, "rollout.engine_dtype", repr(self.engine_dtype), "Use 'float32' or 'bfloat16'.")


@dataclass(frozen=True)
class Reward:
    """What a response earns (Tülu 3, eq. 8 and section 6.2)."""

    right: float = 10.0
    no_stop: float = -10.0
    """Replaces the score of a response that was cut before it stopped."""
    kl_coefficient: float = 0.05
    """β of the k1 penalty per token."""

    def __post_init__(self) -> None:
        for name in ("right", "no_stop"):
            require(math.isfinite(getattr(self, name)), f"reward.{name}", getattr(self, name), "Give a finite number.")
        remedy = "It must be 0 or more."
        require(0 <= self.kl_coefficient < float("inf"), "reward.kl_coefficient", self.kl_coefficient, remedy)
