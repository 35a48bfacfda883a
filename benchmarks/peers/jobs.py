"""How a worker is told what to do: a job as JSON, or a list of them, which then share one start of Python.

On a GPU, where a start takes longer than a run, the table of settings is made so. Peak memory is counted from each
job's beginning on the device; the process' own memory is that of all jobs before it, too.
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

Job = dict[str, Any]


def run(main: Callable[[Job], dict[str, Any]]) -> None:
    """Print what was measured on the last line of stdout; of a list, a job that failed is told as `failed`."""
    job = json.loads(sys.argv[1])
    print("\n" + json.dumps([_guarded(main, each) for each in job] if isinstance(job, list) else main(job)))


def _guarded(main: Callable[[Job], dict[str, Any]], job: Job) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        found = main(job)
    except Exception as error:  # a setting that runs out of memory is a row of the table
        found = {"failed": f"{type(error).__name__}: {error}"[:300]}
    gc.collect()
    if torch.cuda.is_available():
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = time.perf_counter() - started
    print(f"{json.dumps(job['settings'])}: {seconds:.1f} s {json.dumps(found)}", file=sys.stderr, flush=True)
    return found
