"""What `tulu plan` says of a run's memory against what PyTorch allocates in it.

    python benchmarks/memory.py configs/sft_tiny.yaml [options of tulu fit]
    python benchmarks/memory.py --resident configs/sft_tiny.yaml [options of tulu fit]
    python benchmarks/memory.py --gpu configs/sft_tiny.yaml [options of tulu fit]

The run is a real `tulu fit`, of at most two steps, in this process, with PyTorch's profiler counting every allocation
of tensors on the CPU: weights, gradients, optimiser states, activations, caches and whatever a step makes in between. Scoring,
checkpoints and the export are left out: they come before or after the steps. The prediction is made for the largest pass
that the run has had, so that it does not depend on how full the data makes a pack. With `--resident` the profiler is off, and what the system saw
of the process above its start is told instead: modules that load late, what oneDNN takes for itself, and what the C
library's allocator keeps come on top of what PyTorch asks for. With `--gpu` it is the most that PyTorch had allocated on the
device, and beside it the most that its allocator had taken and what else of the device's memory was not free at the end.
"""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tulu_lightning import cli
from tulu_lightning.callbacks.checkpoints import Checkpoints
from tulu_lightning.callbacks.evaluate import Evaluate
from tulu_lightning.callbacks.promote import Promote
from tulu_lightning.launch.plan import plan_of
from tulu_lightning.launch.planned import peak_parts
from tulu_lightning.models.backbone import Packed
from tulu_lightning.rollout.packed_weights import Matrix


def status(name: str) -> int:
    """A line of the process' status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def highest(events: Any) -> int:
    """The most bytes that were allocated at once on the CPU."""
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    total = most = 0
    for _, size in changes:
        total += size
        most = max(most, total)
    return most


class Largest:
    """The largest pass with a gradient that the decoder has had."""

    def __init__(self) -> None:
        self.tokens = self.scored = 0
        inner = Packed.hidden_at

        def hidden_at(packed: Any, decoder: Any, pack: Any, at_N: Any, *rest: Any, **named: Any) -> Any:
            if torch.is_grad_enabled():
                tokens, scored = pack.tokens_T.numel(), pack.target_N.numel()
                self.tokens, self.scored = max((self.tokens, self.scored), (tokens, scored))
            return inner(packed, decoder, pack, at_N, *rest, **named)

        Packed.hidden_at = hidden_at


class Copies:
    """Bytes of the engine's packed copies, which oneDNN allocates and PyTorch does not count."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        inner = Matrix.pack

        def pack(matrix: Any) -> None:
            inner(matrix)
            weight = matrix.weight_NK
            self.held[id(matrix)] = 0 if matrix.packed is None else weight.numel() * weight.element_size()

        Matrix.pack = pack


def fit(argv: list[str]) -> None:
    """Train, with nothing but steps."""
    for callback in (Checkpoints, Evaluate, Promote):
        for name in ("on_fit_start", "on_train_start", "on_train_batch_end", "on_train_end", "on_fit_end"):
            if name in vars(callback):
                setattr(callback, name, lambda *_, **__: None)
    with TemporaryDirectory() as run:
        options = ["--trainer.logger=false", f"--trainer.default_root_dir={run}/run", *argv[1:]]
        assert cli.main(["fit", "--config", argv[0], *options]) == 0


def on_device() -> tuple[int, dict[str, Any]]:
    """Most bytes of tensors on the GPU; and what the allocator held beyond them, and what was taken beside it."""
    free, total = torch.cuda.mem_get_info()
    most, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    beside = total - free - torch.cuda.memory_reserved()
    return most, {"reserved": held, "beside": beside, "gpu": torch.cuda.get_device_name()}


def main(argv: list[str]) -> None:
    """Measure one config."""
    kind = argv[0].removeprefix("--") if argv[0] in ("--resident", "--gpu") else ""
    argv = argv[bool(kind) :]
    largest, copies, more = Largest(), Copies(), dict[str, Any]()
    if kind == "gpu":
        fit(argv)
        measured, more = on_device()
    elif kind == "resident":
        gc.collect()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        fit(argv)
        measured = status("VmHWM") - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            fit(argv)
        measured = highest(profiler.profiler.kineto_results.events()) + sum(copies.held.values())
    plan, _ = plan_of(["--config", *argv], "H100" if kind == "gpu" else "cpu")
    sizes = replace(plan.sizes, micro_tokens=largest.tokens, scored=largest.scored)
    parts = {name: round(size) for name, size in peak_parts(replace(plan, sizes=sizes)).items()}
    if kind == "gpu":
        more["predicted beyond"] = parts.pop("context and allocator")
    predicted = sum(parts.values())
    told = {"config": " ".join(argv), "tokens": largest.tokens, "scored": largest.scored, "parts": parts}
    told |= {"predicted": predicted, "measured": measured, "share": round(predicted / measured, 3)}
    print(json.dumps(told | more))


if __name__ == "__main__":
    main(sys.argv[1:])
