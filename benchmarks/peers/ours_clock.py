"""What the workers of our own stages share: a quiet trainer whose steps are timed, and what is said of them."""

import itertools
import resource
import time
from typing import Any

import lightning as L
import torch

from tulu_lightning.core.packing import ancestors
from tulu_lightning.types import Pack, StepBatch

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Clock(L.Callback):
    """The time at the end of each step, and what the stage says of it."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.cpu: list[float] = []
        self.metrics: list[dict[str, float]] = []
        self.visible: list[int] = []
        """Query-key pairs that the step's attention has to compute: n (n + 1) / 2 a row of n tokens."""
        self.opened = 0.0
        self.began = 0.0
        """When the trainer had everything that it was given, and when its first step began."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.opened = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: StepBatch, batch_idx: int) -> None:
        self.began = self.began or time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.metrics.append(dict(pl_module.metrics))
        self.visible.append(sum(visible(pack) for pack in batch.packs if pack.rows))

    def times(self, started: float) -> dict[str, Any]:
        """What the benchmark reads of a run that began at `started`."""
        ends = self.ends
        return {
            "seconds": [b - a for a, b in itertools.pairwise(ends)],  # of every step but the first
            "cpu_seconds": [b - a for a, b in itertools.pairwise(self.cpu)],  # of all threads
            "visible": self.visible,
            "losses": [step["loss"] for step in self.metrics],
            "grad_norms": [step["grad_norm"] for step in self.metrics],
            "start_seconds": time.perf_counter() - started - sum(ends[-1:]) + sum(ends[:1]),
            **memory(),
        }


def visible(pack: Pack) -> int:
    """Query-key pairs of a pack: a token sees its segment up to itself, and the segments that this one continues."""
    spans, total = pack.spans[: len(pack.spans) - bool(pack.padding)], 0
    for number, (start, end, _) in enumerate(spans):
        before = sum(spans[parent].end - spans[parent].start for parent in ancestors(spans, number))
        total += (end - start) * before + (end - start) * (end - start + 1) // 2
    return total


def memory() -> dict[str, int]:
    """Peak memory of this process, in bytes, and on the device where there is one."""
    found = {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        found["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def trainer(clock: Clock, accelerator: str = "cpu") -> L.Trainer:
    """A trainer on one device that shows nothing."""
    return L.Trainer(
        accelerator=accelerator, devices=1, max_epochs=1, use_distributed_sampler=False, callbacks=clock, **QUIET
    )
