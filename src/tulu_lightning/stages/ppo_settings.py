"""PPO's settings in groups: the critic, the sampling, the reward, dynamic sampling, and when a run stops itself."""

import math
from dataclasses import dataclass, field
from typing import Literal

from tulu_lightning.core.settings import require
from tulu_lightning.errors import InputError
from tulu_lightning.rollout.engines import EngineSettings
from tulu_lightning.stages.optimizer import AdamW

__all__ = ["Critic", "DynamicSampling", "Guards", "Reward", "Rollout"]

Filter = Literal["temperature", "top_p", "top_k"]
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


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
    top_p: float = 1.0
    top_k: int = 0
    allow: tuple[Filter, ...] = ()
    """Names of the three above that are meant to differ from 1, 1 and 0. A filtered sampler draws from another
    distribution than the one that is trained, and the importance ratio is biased: it has to be asked for."""
    staleness: int = 0
    """1: the next batch is sampled while this one trains, from weights that are exactly one update older (Tülu 3,
    section 6.3). 0: sampling waits for the update."""
    seed: int = 0
    engine: EngineSettings = field(default_factory=EngineSettings)
    """What samples."""
    engines: Literal["per_rank", "one"] = "per_rank"
    """On several ranks: an engine on each, which samples its share of a step's prompts, or `one` on the first rank for
    all. Which of them changes no rollout."""
    wait_seconds: float = 3600.0
    """Longest wait for a batch that is sampled ahead and, on several ranks, for the others' shares."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples_per_prompt"):
            require(getattr(self, name) >= 1, f"rollout.{name}", getattr(self, name), "Use at least 1.")
        remedy = "It must be above 0: greedy responses teach nothing."
        require(0 < self.temperature < float("inf"), "rollout.temperature", self.temperature, remedy)
        require(0 < self.top_p <= 1, "rollout.top_p", self.top_p, "It must be above 0 and at most 1.")
        require(self.top_k >= 0, "rollout.top_k", self.top_k, "Use 0 (off) or more.")
        require(self.staleness in (0, 1), "rollout.staleness", self.staleness, "Use 0 or 1.")
        require(self.engines in ("per_rank", "one"), "rollout.engines", repr(self.engines), "Use per_rank or one.")
        require(0 < self.wait_seconds < float("inf"), "rollout.wait_seconds", self.wait_seconds, "It must be above 0.")
        object.__setattr__(self, "allow", tuple(self.allow))
        for name in self.allow:
            require(name in NEUTRAL, "rollout.allow", repr(name), f"Use names of {', '.join(NEUTRAL)}.")
        for name, neutral in NEUTRAL.items():
            self._check_filter(name, getattr(self, name), neutral)

    def _check_filter(self, name: str, value: float, neutral: float) -> None:
        if value != neutral and name not in self.allow:
            what = f"is {value}, so the sampler would draw from another distribution than the one that is trained"
            remedy = f"Leave it at {neutral}, or allow it by name: rollout.allow: [{name}]."
            raise InputError(f"rollout.{name}", what, remedy)
        if value == neutral and name in self.allow:
            what = f"names {name}, which is {neutral}: there is nothing to allow"
            raise InputError("rollout.allow", what, f"Set rollout.{name}, or leave the name out.")


@dataclass(frozen=True)
class Reward:
    """What a verdict is worth (Tülu 3, equation 8)."""

    right: float = 10.0
    """What a response with score 1 earns; times the sum of its checks' weights."""

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.right) and self.right != 0, "reward.right", self.right, "Give a number other than 0."
        )


@dataclass(frozen=True)
class DynamicSampling:
    """Groups whose rewards are all equal teach nothing: leave them out and sample further prompts in their place."""

    max_refills: int = 3
    """Rounds of further prompts at most; then the step trains on what there is."""

    def __post_init__(self) -> None:
        require(self.max_refills >= 1, "dynamic_sampling.max_refills", self.max_refills, "Use at least 1.")


@dataclass(frozen=True)
class Guards:
    """When a run stops itself, after saving: it can be gone on with."""

    mismatch_kl: float | None = 0.1
    """Limit of the KL between sampler and trainer (k3, nats a token); healthy is about 1e-3 in bf16, 1e-9 in fp32."""
    mismatch_patience: int = 5
    """So many steps in a row above the limit stop the run."""
    equal_rewards: int | None = 50
    """So many steps in a row in which all rewards are equal stop the run: it learns nothing. Where a step has one response,
    its reward is held against that of the step before."""

    def __post_init__(self) -> None:
        if self.mismatch_kl is not None:
            require(0 < self.mismatch_kl < float("inf"), "guards.mismatch_kl", self.mismatch_kl, "It must be above 0.")
        require(self.mismatch_patience >= 1, "guards.mismatch_patience", self.mismatch_patience, "Use at least 1.")
        if self.equal_rewards is not None:
            require(self.equal_rewards >= 1, "guards.equal_rewards", self.equal_rewards, "Use at least 1, or null.")
