"""What the workers of `generate.py` share: timed calls in one process. Standard library only: other environments run it."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


def timed(generate: Callable[[int], int], job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each call; `generate(seed)` gives the number of new tokens. The first call is not counted."""
    generate(0)
    seconds, cpu_seconds, tokens = [], [], []
    for seed in range(1, job["repeats"] + 1):
        wall, cpu = time.perf_counter(), cpu_time()
        tokens.append(generate(seed))
        seconds.append(time.perf_counter() - wall)
        cpu_seconds.append(cpu_time() - cpu)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens": tokens,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def cpu_time() -> float:
    """Of this process and of its children that ended."""
    return sum(os.times()[:4])


def main(build: Callable[[dict[str, Any]], Callable[[int], int]]) -> None:
    """Run the job of the command line; the result is the last line of stdout."""
    job = json.loads(sys.argv[1])
    print("\n" + json.dumps(timed(build(job), job)), flush=True)
