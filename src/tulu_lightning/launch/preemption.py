"""When the machine is wanted back: signals outside of training, and a SLURM job that is queued again."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tulu_lightning.errors import Preempted

__all__ = ["preemptible", "requeue", "started_by_lightning"]

ASKS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def preemptible() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 end this process as Ctrl-C does, but with the status that says "try again later".

    Within training `callbacks.checkpoints.Checkpoints` takes them over, to finish and save the step first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def handle(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a child that was forked, and has its own end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise Preempted(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in ASKS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def started_by_lightning() -> bool:
    """Whether this process is a rank that Lightning's launcher in the first rank's process has started."""
    outside = any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "GROUP_RANK", "SLURM_PROCID"))
    return not outside and os.environ.get("LOCAL_RANK", "0") != "0"


def requeue() -> None:
    """Have SLURM start this job again; says what it answered, and that the job must be started by hand if it refused."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False, timeout=60)
        failed = done.stderr.strip() or f"status {done.returncode}" if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        failed = str(error)
    if failed:
        print(f"tulu: SLURM job {job} was not queued again ({failed}); submit it again by hand", file=sys.stderr)
    else:
        print(f"SLURM job {job} is queued again", flush=True)
