"""One run of TRL's SFTTrainer on given rows, timed by whole optimiser steps; started by benchmarks/sft.py.

    python benchmarks/peers/trl_sft.py '{"rows": "rows.jsonl", "model": "...", ...}'

Takes a job as JSON, prints what it measured as JSON on the last line of stdout. The trainer is TRL's own; added are the
clock, a count of the tokens that are no padding, and (`"loss": "plain"`) the loss that transformers' Trainer computes
from all logits, which on a CPU can be faster than TRL's chunked one.
"""

import json
import time
from pathlib import Path
from typing import Any

import datasets
import jobs
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from trl import SFTConfig, SFTTrainer
from trl_clock import Clock, common

# SmolLM2's own template with the spans that TRL's `assistant_only_loss` needs: the answer and its end token.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


class Timed(SFTTrainer):
    """TRL's trainer with counters."""

    plain = False
    micros: list[dict[str, int]]
    """What each forward pass held."""
    prepare_seconds = 0.0

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        prepared = super()._prepare_dataset(*args, **kwargs)
        self.prepare_seconds += time.perf_counter() - started
        return prepared

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs.get("attention_mask")
        real = ids.numel() if mask is None else int(mask.sum())
        trained = int((labels[:, 1:] != -100).sum())
        self.micros.append({"tokens": real, "trained": trained, "computed": ids.numel()})
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.plain:
            return Trainer.compute_loss(self, model, inputs | {"use_cache": False}, *args, **kwargs)
        return super().compute_loss(model, inputs, *args, **kwargs)


def config(job: dict[str, Any]) -> SFTConfig:
    """TRL's settings for a job."""
    settings = job["settings"]
    packing = settings.get("packing")
    return SFTConfig(
        **common(job),
        max_length=None if settings.get("padding_free") else settings.get("length", job["max_tokens"]),
        packing=packing is not None,
        packing_strategy=packing or "bfd",
        padding_free=settings.get("padding_free", False),
        assistant_only_loss=True,
        use_liger_kernel=settings.get("liger", False),
        use_cpu=job["accelerator"] == "cpu",
    )


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Train and measure."""
    datasets.disable_progress_bars()
    datasets.disable_caching()
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().split("\n") if line]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.chat_template = TEMPLATE.replace("+ system +", f"+ {job['system']!r} +")
    weights = torch.bfloat16 if job["settings"].get("weights") == "bfloat16" else torch.float32
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=weights, attn_implementation=job["settings"].get("attention", "sdpa")
    )
    Timed.micros, Timed.plain = [], job["settings"].get("loss") == "plain"
    trainer = Timed(
        model=model, args=config(job), train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    clock = Clock(trainer.micros)
    if job["steps"]:
        trainer.add_callback(clock)
        trainer.train()
    return {**clock.times(started), "prepare_seconds": trainer.prepare_seconds, "rows": len(rows)}


if __name__ == "__main__":
    jobs.run(main)
