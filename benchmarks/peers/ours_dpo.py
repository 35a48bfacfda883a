"""One run of our DPO on given pairs, timed by whole optimiser steps; started by benchmarks/dpo.py.

Takes a job as JSON, prints what it measured as JSON on the last line of stdout, as peers/trl_dpo.py does.
"""

import time
from typing import Any

import jobs
from ours_clock import Clock, trainer

from tulu_lightning.core.preference import DPO as DPOLoss
from tulu_lightning.data.preference import PreferenceData
from tulu_lightning.data.sources import Source
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.stages.dpo import DPO
from tulu_lightning.stages.optimizer import AdamW


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Train and measure."""
    data = PreferenceData(
        sources=[Source("pairs", path=job["rows"])],
        tokenizer=job["model"],
        template=job["template"],
        max_tokens=job["max_tokens"],
        examples_per_step=job["pairs_per_step"],
        max_steps=job["warmup"] + job["steps"],
        seed=job["seed"],
        **job["settings"].get("data", {}),
    )
    started = time.perf_counter()
    data.setup()
    backbone = Backbone(job["model"], compute_dtype=job["dtype"], **job["settings"].get("backbone", {}))
    optimizer = AdamW(lr=job["lr"], schedule="constant", weight_decay=0.0, max_grad_norm=1.0)
    stage, clock = DPO(backbone, optimizer, DPOLoss(beta=job["beta"])), Clock()
    trainer(clock, job["accelerator"]).fit(stage, data)
    tokens = [int(step["tokens"]) for step in clock.metrics]
    return {
        **clock.times(started),
        "computed": tokens,
        "trained": [int(step["trained_tokens"]) for step in clock.metrics],
        "scored": [
            round(job["pairs_per_step"] * (step["length_chosen"] + step["length_rejected"])) for step in clock.metrics
        ],  # of both sides; what their answers begin with in common is trained once and scored twice
        "reference_seconds": clock.began - clock.opened,
        "reference_pairs": len(data.documents),
    }


if __name__ == "__main__":
    jobs.run(main)
