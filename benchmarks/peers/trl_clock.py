"""What the workers of TRL's trainers share: the clock, the settings that are the same for all, and the result."""

import itertools
import resource
import time
from typing import Any

import torch
from transformers import TrainerCallback


class Clock(TrainerCallback):
    """The time at the end of each optimiser step, and what was logged there."""

    def __init__(self, micros: list[dict[str, int]]) -> None:
        """Keep the list to which the trainer adds what each forward pass held."""
        self.passes, self.ends, self.cpu, self.micros = micros, [], [], []
        self.logs: list[dict[str, float]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.micros.append(len(self.passes))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.logs.append(logs)

    def times(self, started: float) -> dict[str, Any]:
        """What the benchmark reads of a run that began at `started`."""
        ends, bounds = self.ends, [0, *self.micros]
        steps = [self.passes[a:b] for a, b in itertools.pairwise(bounds)]
        found = {
            "seconds": [b - a for a, b in itertools.pairwise(ends)],  # of every step but the first
            "cpu_seconds": [b - a for a, b in itertools.pairwise(self.cpu)],  # of all threads
            **{key: [sum(micro[key] for micro in step) for step in steps] for key in ("tokens", "trained", "computed")},
            "losses": [float(log["loss"]) for log in self.logs],
            "grad_norms": [float(log["grad_norm"]) for log in self.logs],
            "start_seconds": time.perf_counter() - started - sum(ends[-1:]) + sum(ends[:1]),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        if torch.cuda.is_available():
            found["device_peak_bytes"] = torch.cuda.max_memory_allocated()
        return found


def common(job: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a TRL config that do not depend on the kind of training."""
    settings = job["settings"]
    return {
        "output_dir": job["folder"],
        "per_device_train_batch_size": settings["batch"],
        "gradient_accumulation_steps": settings["accumulate"],
        "max_steps": job["warmup"] + job["steps"],
        "train_sampling_strategy": settings.get("sampling", "sequential"),
        "bf16": job["dtype"] == "bfloat16",
        "gradient_checkpointing": settings.get("checkpointing", False),
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataset_num_proc": settings.get("processes"),
        "seed": 0,
    }
