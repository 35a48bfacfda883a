"""Which weights sample which step, the batch that is sampled ahead, and the second try after an engine died."""

import threading
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from tulu_lightning.errors import RunStopped
from tulu_lightning.progress import duration
from tulu_lightning.rollout.engine import Engine, EngineError
from tulu_lightning.stages.collect import Collected, Collector, pack_up, unpack
from tulu_lightning.types import PromptBatch

__all__ = ["Rollouts", "expected_version"]


def expected_version(step: int, every_n_steps: int = 1, staleness: int = 0) -> int:
    """Version of the weights that sample the batch of a step.

    Version v is the weights after v steps. They are pushed before every n-th step; a batch that is sampled ahead is
    sampled during the step before it.

    Example: n = 1, staleness 1: batches 0 and 1 are of version 0, batch 2 of version 1. n = 2, no staleness: 0, 0, 2, 2.
    """
    at = max(step - staleness, 0)
    return at - at % every_n_steps


class _Ahead(threading.Thread):
    """Collects one batch beside the training of another; a daemon, so that a second Ctrl-C does not wait for it."""

    def __init__(self, work: Callable[[], Collected], batch: PromptBatch, version: int) -> None:
        super().__init__(name=f"rollouts of step {batch.step}", daemon=True)
        self.work, self.batch, self.version = work, batch, version
        self.result: Collected | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.work()
        except BaseException as error:  # raised in the thread that waits
            self.error = error


class Rollouts:
    """Batches of rollouts, each from exactly the weights that it should be from.

    Args:
        collector: samples and scores.
        engine: gives the present engine.
        restart: gives a new one in its place that holds the weights of a version.
        staleness: 0 or 1.
        seconds: longest wait for a batch that is sampled ahead.
    """

    def __init__(
        self,
        collector: Collector,
        engine: Callable[[], Engine],
        restart: Callable[[int], Engine],
        staleness: int = 0,
        seconds: float = 3600.0,
    ) -> None:
        self.collector, self.staleness, self.every_n_steps = collector, staleness, 1
        self.seconds, self.seconds_wait = seconds, 0.0
        self._engine, self._restart = engine, restart
        self._ahead: _Ahead | None = None
        self._ready: Collected | None = None

    def take(self, batch: PromptBatch) -> Collected:
        """The rollouts of a step: those that were sampled ahead, or new ones.

        Raises:
            RuntimeError: they are of other weights than they should be.
            RunStopped: the engine died, and so did the one in its place.
        """
        self.wait()
        ready, self._ready = self._ready, None
        version = self.expected(batch.step)
        if ready is None:
            return self._collect(batch, version)
        if (ready.step, ready.version) != (batch.step, version):
            raise RuntimeError(
                f"the rollouts at hand are of step {ready.step} and version {ready.version}, and step {batch.step} "
                f"learns from version {version}"
            )
        return ready

    def expected(self, step: int) -> int:
        """`expected_version` under the present settings."""
        return expected_version(step, self.every_n_steps, self.staleness)

    def begin(self, batch: PromptBatch) -> None:
        """Start sampling a later step's batch from the weights that the engine holds now."""
        engine, version = self._engine(), self.expected(batch.step)
        self._ahead = _Ahead(lambda: self.collector.collect(engine, batch, version), batch, version)
        self._ahead.start()

    def wait(self) -> None:
        """Wait until no batch is being sampled; the engine may take new weights then.

        Raises:
            RunStopped: the engine does not end.
        """
        if self._ahead is None:
            return
        started = time.perf_counter()
        ahead, self._ahead = self._ahead, None
        ahead.join(self.seconds)
        if ahead.is_alive():
            raise RunStopped(
                f"the trainer has waited {duration(self.seconds)} for the rollouts of step {ahead.batch.step}, which the "
                "engine samples ahead. Nothing of that step was trained; the same command goes on from the last "
                "checkpoint. Raise rollout.wait_seconds if they take so long."
            )
        if isinstance(ahead.error, EngineError):
            self._ready = self._again(ahead.batch, ahead.version, ahead.error)
        elif ahead.error is not None:
            raise ahead.error
        else:
            self._ready = ahead.result
        self.seconds_wait += time.perf_counter() - started

    def _collect(self, batch: PromptBatch, version: int) -> Collected:
        try:
            return self.collector.collect(self._engine(), batch, version)
        except EngineError as error:
            return self._again(batch, version, error)

    def _again(self, batch: PromptBatch, version: int, error: EngineError) -> Collected:
        """The same rollouts from another engine: seeds depend on the step, not on the engine."""
        rank_zero_warn(
            f"the engine failed at the rollouts of step {batch.step} ({error}); nothing of them was trained yet: "
            "starting another engine and sampling them again"
        )
        try:
            return self.collector.collect(self._restart(version), batch, version)
        except EngineError as second:
            raise RunStopped(
                f"the engine failed twice at the rollouts of step {batch.step}: {error}; then {second}. Nothing of that "
                "step was trained. When the engine can run again, the same command goes on from the last checkpoint."
            ) from second

    # Checkpoints ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any] | None:
        """The batch that is sampled ahead, once it is whole; None if there is none."""
        self.wait()
        return None if self._ready is None else pack_up(self._ready)

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on with what `state` gave."""
        self._ready = None if state is None else unpack(state)

    def close(self, wait: bool = True) -> None:
        """End; what is still being sampled is lost."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and wait:
            ahead.join()
