"""One run of our SFT on given rows, timed by whole optimiser steps; started by benchmarks/sft.py.

Takes a job as JSON, prints what it measured as JSON on the last line of stdout, as peers/trl_sft.py does.
"""

import itertools
import json
import resource
import sys
import time
from typing import Any

import lightning as L

from tulu_lightning.data.sft import SFTData
from tulu_lightning.data.sources import Source
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.sft import SFT
from tulu_lightning.types import StepBatch

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Clock(L.Callback):
    """The time at the end of each step, and what the stage says of it."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.cpu: list[float] = []
        self.metrics: list[dict[str, float]] = []
        self.visible: list[int] = []
        """Query-key pairs that the step's attention has to compute: n (n + 1) / 2 a row of n tokens."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: StepBatch, batch_idx: int
    ) -> None:
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.metrics.append(dict(pl_module.metrics))
        lengths = [span.end - span.start for pack in batch.packs if pack.rows for span in pack.spans]
        self.visible.append(sum(n * (n + 1) // 2 for n in lengths))


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Train and measure."""
    total = job["warmup"] + job["steps"]
    data = SFTData(
        sources=[Source("rows", path=job["rows"])],
        tokenizer=job["model"],
        template=job["template"],
        max_tokens=job["max_tokens"],
        examples_per_step=job["rows_per_step"],
        max_steps=total if job["steps"] else None,
        seed=job["seed"],
        **job["settings"].get("data", {}),
    )
    started = time.perf_counter()
    data.setup()
    if not job["steps"]:
        for _ in data.train_dataloader():  # packing is done step by step
            pass
    prepared = time.perf_counter() - started
    clock = Clock()
    if job["steps"]:
        backbone = Backbone(job["model"], compute_dtype=job["dtype"], **job["settings"].get("backbone", {}))
        stage = SFT(backbone, AdamW(lr=job["lr"], schedule="constant", weight_decay=0.0, max_grad_norm=1.0))
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, use_distributed_sampler=False, callbacks=clock, **QUIET
        )
        trainer.fit(stage, data)
    ends, metrics = clock.ends, clock.metrics
    return {
        "seconds": [b - a for a, b in itertools.pairwise(ends)],  # of every step but the first
        "cpu_seconds": [b - a for a, b in zip(clock.cpu, clock.cpu[1:], strict=False)],  # of all threads
        "tokens": [int(step["tokens"]) for step in metrics],
        "trained": [int(step["trained_tokens"]) for step in metrics],
        "computed": [int(step["tokens"]) for step in metrics],
        "visible": clock.visible,
        "losses": [step["loss"] for step in metrics],
        "grad_norms": [step["grad_norm"] for step in metrics],
        "prepare_seconds": prepared,
        "start_seconds": time.perf_counter() - started - sum(ends[-1:]) + sum(ends[:1]),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
