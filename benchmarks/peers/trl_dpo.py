"""One run of TRL's DPOTrainer on given pairs, timed by whole optimiser steps; started by benchmarks/dpo.py.

Takes a job as JSON, prints what it measured as JSON on the last line of stdout. The trainer is TRL's own, its
reference log-probs computed before the first step; the pairs come as token ids, so that both sides train the same.
`"head": "scored"` computes the output head for scored tokens only, as TRL does on a GPU; on a CPU as shipped it computes
the head for every position, padding too.
"""

import json
import time
from pathlib import Path
from typing import Any

import datasets
import jobs
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils
from trl_clock import Clock, common


class Timed(DPOTrainer):
    """TRL's trainer with counters."""

    micros: list[dict[str, int]]
    """What each forward pass held."""
    reference_seconds = 0.0

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # token ids already

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        prepared = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_seconds += time.perf_counter() - started
        return prepared

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        real, trained = int(inputs["attention_mask"].sum()), int(inputs["completion_mask"].sum())
        self.micros.append({"tokens": real, "trained": trained, "computed": inputs["input_ids"].numel()})
        return super().training_step(model, inputs, *args, **kwargs)


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Train and measure."""
    datasets.disable_progress_bars()
    datasets.disable_caching()
    settings = job["settings"]
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().split("\n") if line]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    if settings.get("head") == "scored":
        utils._use_triton = lambda device: True  # decides there, and only there, which positions are scored
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    Timed.micros = []
    config = DPOConfig(
        **common(job),
        beta=job["beta"],
        loss_type=["sigmoid_norm"],
        max_length=job["max_tokens"],
        precompute_ref_log_probs=True,
        use_liger_kernel=settings.get("liger", False),
        use_cpu=job["accelerator"] == "cpu",
    )
    trainer = Timed(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    clock = Clock(trainer.micros)
    trainer.add_callback(clock)
    trainer.train()
    return {
        **clock.times(started),
        "reference_seconds": trainer.reference_seconds,
        "reference_pairs": len(rows),
    }


if __name__ == "__main__":
    jobs.run(main)
