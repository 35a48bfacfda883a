"""One run of our SFT on given rows, timed by whole optimiser steps; started by benchmarks/sft.py.

Takes a job as JSON, prints what it measured as JSON on the last line of stdout, as peers/trl_sft.py does.
"""

import time
from typing import Any

import jobs
from ours_clock import Clock, trainer

from tulu_lightning.data.sft import SFTData
from tulu_lightning.data.sources import Source
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.sft import SFT


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
        trainer(clock, job["accelerator"]).fit(stage, data)
    metrics = clock.metrics
    return {
        **clock.times(started),
        "tokens": [int(step["tokens"]) for step in metrics],
        "trained": [int(step["trained_tokens"]) for step in metrics],
        "computed": [int(step["tokens"]) for step in metrics],
        "prepare_seconds": prepared,
    }


if __name__ == "__main__":
    jobs.run(main)
