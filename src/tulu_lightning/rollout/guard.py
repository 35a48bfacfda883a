"""A library that believes that it owns the process is held to its own things."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

__all__ = ["ProcessGroup", "guarded", "quiet_seed"]


@contextmanager
def guarded() -> Iterator[None]:
    """Put back what vLLM changes: random states (torch's, numpy's, Python's), environment variables, the number of
    torch's threads and the function that sets it.

    On a CPU it also empties `torch.accelerator.synchronize` and `empty_cache`. They stay empty: vLLM itself calls them,
    and without an accelerator they could only raise an error.
    """
    set_threads, threads, environment = torch.set_num_threads, torch.get_num_threads(), dict(os.environ)
    states = random.getstate(), np.random.get_state()
    with quiet_seed():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_num_threads = set_threads
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            if dict(os.environ) != environment:
                os.environ.clear()
                os.environ.update(environment)


@contextmanager
def quiet_seed() -> Iterator[None]:
    """Put back torch's random states, which sampling moves even where every request has a seed of its own."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield


class ProcessGroup:
    """Whose the default process group is.

    vLLM makes one where there is none, shares it between all engines of the process, and destroys it with the first
    engine that is closed, the trainer's too. Here the last engine's closing destroys it, and only if vLLM made it.
    """

    def __init__(self) -> None:
        self._users = 0
        self._foreign = False

    def join(self) -> None:
        """Call before an engine is built."""
        if not self._users:
            self._foreign = dist.is_initialized()
        self._users += 1

    def leave(self) -> None:
        """Call before it is closed."""
        self._users -= 1

    def clean(self, cleanup: Callable[[], Any]) -> None:
        """In the place of vLLM's own clean-up."""
        if self._users:
            return
        destroy = dist.destroy_process_group

        def others(group: Any = None) -> None:
            if group is not None and group is not dist.group.WORLD:
                destroy(group)

        dist.destroy_process_group = others if self._foreign else destroy
        try:
            cleanup()
        finally:
            dist.destroy_process_group = destroy
