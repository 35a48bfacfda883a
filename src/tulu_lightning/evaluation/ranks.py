"""One `tulu eval` by several processes: torchrun's, or those that `--devices` starts. Items are dealt; the first process writes."""

import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.sheet import Sheet
from tulu_lightning.rollout.together import ALONE, Together

__all__ = ["collect", "join", "rank_sheet", "start"]

WAIT = 24 * 3600.0
"""Seconds that a process waits for the others' share of a task: shares are alike in number, not in length."""


def start(devices: int, argv: Sequence[str]) -> int:
    """Run `tulu eval` in so many processes of this machine.

    Args:
        devices: how many; on a machine with GPUs each has one of its own.
        argv: arguments of the command, without `--devices`.

    Returns:
        0 if all of them ended well, else 1.

    Raises:
        InputError: there are fewer GPUs.
    """
    there = torch.cuda.device_count()
    if there and devices > there:
        raise InputError("--devices", f"is {devices}, and there are {there} GPUs", f"Use at most {there}.")
    threads = max(1, (os.cpu_count() or 1) // devices)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
    command = [*torchrun, "-m", "tulu_lightning", "eval", *argv]
    return 0 if subprocess.run(command, env=environment, check=False).returncode == 0 else 1


def join() -> Together:
    """The processes that torchrun started this one with; alone if it did not."""
    world = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if world == 1:
        return ALONE
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=WAIT))
    return Together(dist.get_rank(), world, dist.new_group(backend="gloo", timeout=timedelta(seconds=WAIT)), WAIT)


def rank_sheet(sheet: Path, rank: int) -> Path:
    """Where a process keeps the items that it has finished."""
    return sheet.with_name(sheet.name.replace(".items.jsonl", f".rank{rank}.items.jsonl"))


def collect(sheet: Path, head: dict[str, Any]) -> Sheet:
    """The finished items of a task, those that the processes of an earlier start kept included, in one file.

    Args:
        sheet: of the task.
        head: what the items must belong to.
    """
    parts = sorted(sheet.parent.glob(rank_sheet(sheet, 0).name.replace("rank0", "rank*")))
    whole = Sheet(sheet, head, parts)
    for part in parts:  # only now that what they hold stands in the whole
        part.unlink()
    return whole
