"""One run of TRL's SFTTrainer on given rows, timed by whole optimiser steps; started by benchmarks/sft.py.

    python benchmarks/peers/trl_sft.py '{"rows": "rows.jsonl", "model": "...", ...}'

Takes a job as JSON, prints what it measured as JSON on the last line of stdout. The trainer is TRL's own; added are the
clock, a count of the tokens that are no padding, and (`"loss": "plain"`) the loss that transformers' Trainer computes
from all logits, which on a CPU can be faster than TRL's chunked one.
"""

import itertools
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

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


class Clock(TrainerCallback):
    """The time at the end of each optimiser step, and what was logged there."""

    def __init__(self, trainer: Timed) -> None:
        self.trainer, self.ends, self.cpu, self.micros = trainer, [], [], []
        self.logs: list[dict[str, float]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.micros.append(len(self.trainer.micros))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.logs.append(logs)


def config(job: dict[str, Any]) -> SFTConfig:
    """TRL's settings for a job."""
    settings = job["settings"]
    packing = settings.get("packing")
    return SFTConfig(
        output_dir=job["folder"],
        per_device_train_batch_size=settings["batch"],
        gradient_accumulation_steps=settings["accumulate"],
        max_steps=job["warmup"] + job["steps"],
        max_length=None if settings.get("padding_free") else settings.get("length", job["max_tokens"]),
        packing=packing is not None,
        packing_strategy=packing or "bfd",
        padding_free=settings.get("padding_free", False),
        train_sampling_strategy=settings.get("sampling", "sequential"),
        assistant_only_loss=True,
        bf16=job["dtype"] == "bfloat16",
        gradient_checkpointing=False,
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataset_num_proc=settings.get("processes"),
        seed=0,
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
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=weights)
    Timed.micros, Timed.plain = [], job["settings"].get("loss") == "plain"
    trainer = Timed(
        model=model, args=config(job), train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    clock = Clock(trainer)
    if job["steps"]:
        trainer.add_callback(clock)
        trainer.train()
    ends, bounds = clock.ends, [0, *clock.micros]
    steps = [trainer.micros[a:b] for a, b in itertools.pairwise(bounds)]
    return {
        "seconds": [b - a for a, b in itertools.pairwise(ends)],  # of every step but the first
        "cpu_seconds": [b - a for a, b in zip(clock.cpu, clock.cpu[1:], strict=False)],  # of all threads
        **{key: [sum(micro[key] for micro in step) for step in steps] for key in ("tokens", "trained", "computed")},
        "losses": [float(log["loss"]) for log in clock.logs],
        "grad_norms": [float(log["grad_norm"]) for log in clock.logs],
        "prepare_seconds": trainer.prepare_seconds,
        "rows": len(rows),
        "start_seconds": time.perf_counter() - started - sum(ends[-1:]) + sum(ends[:1]),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
