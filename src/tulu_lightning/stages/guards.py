"""When a PPO run stops itself: the sampler drifted away from the trainer, or there is nothing to learn from."""

from collections.abc import Mapping
from typing import Any

from tulu_lightning.stages.ppo_settings import Guards

__all__ = ["Watchman"]

CAUSES = (
    "likely causes: an engine in another dtype than the trainer (model.init_args.rollout.engine.dtype), weights that are "
    "not the trainer's (RolloutRefresh with its canary says so), sampling filters (rollout.temperature, top_p, top_k), "
    "another model folder or tokenizer behind the engine, or an engine that computes the architecture in another way"
)
REMEDY = (
    "Try rollout.engine.dtype: float32 or rollout.engine.kind: local for a step, RolloutRefresh with every_n_steps 1, or "
    "raise guards.mismatch_kl if the numbers are as they should be; the same command goes on from the checkpoint."
)


class Watchman:
    """Counts the steps in a row at which something is wrong."""

    def __init__(self, guards: Guards) -> None:
        self.guards = guards
        self.apart = self.equal = 0
        self.alone: float | None = None

    def after(self, step: int, metrics: Mapping[str, float], rewards: tuple[float, ...]) -> str:
        """Why the run has to stop after this step; empty if it need not.

        Args:
            step: finished steps.
            metrics: of the step.
            rewards: of all responses that were sampled.
        """
        guards = self.guards
        if guards.mismatch_kl is not None and "mismatch_kl" in metrics:
            self.apart = self.apart + 1 if not metrics["mismatch_kl"] <= guards.mismatch_kl else 0  # nan is apart, too
        # A lone reward equals itself: it is held against that of the step before.
        changed = len(rewards) == 1 and rewards[0] != self.alone
        self.alone = rewards[0] if len(rewards) == 1 else None
        self.equal = self.equal + 1 if len(set(rewards)) <= 1 and not changed else 0
        if self.apart >= guards.mismatch_patience:
            return self._apart(step, metrics)
        if guards.equal_rewards is not None and self.equal >= guards.equal_rewards:
            return self._equal(step, metrics, rewards)
        return ""

    def state(self) -> dict[str, Any]:
        """The counts, for a checkpoint."""
        return {"apart": self.apart, "equal": self.equal, "alone": self.alone}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what `state` gave. A count that has stopped a run starts anew: the user has seen it, and goes on."""
        limits = {"apart": self.guards.mismatch_patience, "equal": self.guards.equal_rewards}
        for name, limit in limits.items():
            setattr(self, name, 0 if limit is not None and state[name] >= limit else state[name])
        self.alone = state.get("alone")

    def _apart(self, step: int, metrics: Mapping[str, float]) -> str:
        names = ("mismatch_kl", "mismatch_mean", "mismatch_max", "ess", "correction_clipped")
        numbers = ", ".join(f"{name} {metrics[name]:.3g}" for name in names if name in metrics)
        return (
            f"sampler and trainer disagree: mismatch_kl was above {self.guards.mismatch_kl} for {self.apart} steps in a "
            f"row, up to step {step} ({numbers}; sampled by weights of version {metrics.get('version', -1):.0f}). "
            f"{CAUSES[0].upper()}{CAUSES[1:]}. {REMEDY}"
        )

    def _equal(self, step: int, metrics: Mapping[str, float], rewards: tuple[float, ...]) -> str:
        outcomes = {k.removeprefix("outcome_"): int(v) for k, v in metrics.items() if k.startswith("outcome_")}
        said = ", ".join(f"{name} {count}" for name, count in outcomes.items() if count)
        stopped = metrics.get("stop_share", 0.0)
        return (
            f"all rewards were equal ({next(iter(rewards), 0.0):g}) for {self.equal} steps in a row, up to step {step}: "
            f"there is nothing to learn from. The last step's outcomes: {said or 'none'}; {stopped:.0%} of its responses "
            "stopped by themselves. Check the prompts' verifiers and ground truths (`tulu verify`), their difficulty, "
            "max_new_tokens and the stop tokens; guards.equal_rewards sets the limit (null: none)."
        )
