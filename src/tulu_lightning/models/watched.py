"""The part of `Fsdp2` that starts the ranks together, watches over them (`models.waiting`) and lets them go."""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed import TCPStore, distributed_c10d  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import _torchelastic_use_agent_store

from tulu_lightning.errors import InputError, RunStopped
from tulu_lightning.models.failures import await_all, first_line, follows, say
from tulu_lightning.models.waiting import Watch

__all__ = ["WatchedRanks"]

MARGIN = timedelta(minutes=1)
"""By how much the collectives' own timeout is longer than the watch's, which says more."""
START = 600.0
"""Seconds that ranks may come one after the other at the start, if the timeout is not shorter."""
LEAVING = 10.0
"""Seconds that the process groups may take to end with the process."""


class WatchedRanks(ModelParallelStrategy):
    """A strategy whose ranks end together, and say why.

    `timeout` of the strategy is how long a rank may wait for the others in one place.
    """

    _watch: Watch | None = None
    _rounds = 0  # of this process: a recipe has a trainer a stage, and all use one process group

    def _setup_distributed(self) -> None:
        self.set_world_ranks()
        if dist.is_available() and not dist.is_initialized():
            self._join()
        super()._setup_distributed()
        if dist.is_initialized() and self.world_size > 1:
            store = distributed_c10d._get_default_store()
            WatchedRanks._rounds += 1
            self._watch = Watch(store, self.global_rank, self.world_size, self._seconds(), WatchedRanks._rounds)
            self._watch.start()
            _told.install()

    def _seconds(self) -> float:
        return (self._timeout or distributed_c10d.default_pg_timeout).total_seconds()

    def _join(self) -> None:
        """The process group, once every rank has come; Lightning takes it as it is."""
        environment: Any = self.cluster_environment
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        address, port, rank, world = environment.main_address, environment.main_port, self.global_rank, self.world_size
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
        seconds = min(START, self._seconds())
        hosts = rank == 0 and not _torchelastic_use_agent_store()
        try:
            store = TCPStore(
                address,
                port,
                world,
                hosts,
                timedelta(seconds=seconds),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except dist.DistError as error:
            where = f"rank {rank} of {world} waited {seconds:.0f} s for rank 0 at {address}:{port}"
            raise RuntimeError(f"{where}, which did not answer: {error}") from error
        await_all(store, rank, world, seconds, say)
        device = self.root_device if self.root_device.type != "cpu" else None
        timeout = timedelta(seconds=self._seconds()) + MARGIN
        backend = self._get_process_group_backend()
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=device)
        atexit.register(_leave)  # NCCL complains of groups that are left to the interpreter's end

    def setup_environment(self) -> None:
        """Start the ranks together; the groups of the mesh get the timeout of the whole, which is else NCCL's 10 minutes."""
        super().setup_environment()
        self.set_timeouts()

    def set_timeouts(self) -> None:
        """Give every group of ranks that there is the timeout of the whole."""
        timeout = timedelta(seconds=self._seconds()) + MARGIN
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timeout, group)

    def on_exception(self, exception: BaseException) -> None:
        """Tell the others, and say first of all which rank it was."""
        super().on_exception(exception)
        watch, self._watch = self._watch, None
        if watch is None:
            return
        if threading.current_thread() is threading.main_thread():
            # torchrun ends all ranks once one has left. Lightning's handler would answer by a broadcast, to ranks that
            # are gone; its teardown, which comes next, puts back what was there before it.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        cause = watch.raised(exception)
        if isinstance(exception, (InputError, RunStopped, KeyboardInterrupt)):  # the command line says those
            return
        if cause is None or not follows(exception, cause):
            say(f"rank {watch.rank} of {watch.world} failed: {first_line(exception)}")
            return
        _told.add(exception)
        if watch.speaks():
            say(watch.ends(cause))

    def teardown(self) -> None:
        """End the watch: what the ranks still do they do alone."""
        if self._watch is not None:
            self._watch.done()
            self._watch = None
        super().teardown()


class _Told:
    """Exceptions of ranks that only follow another's: their traceback would bury the one that matters."""

    def __init__(self) -> None:
        self._before: Callable[..., Any] | None = None
        self._last: BaseException | None = None

    def add(self, exception: BaseException) -> None:
        self._last = exception

    def install(self) -> None:
        if self._before is None:
            self._before, sys.excepthook = sys.excepthook, self._hook

    def _hook(self, kind: Any, value: BaseException, trace: Any) -> None:
        if value is not self._last and self._before is not None:
            self._before(kind, value, trace)


_told = _Told()


def _leave() -> None:
    """Destroy the process groups, for a limited time: with a rank that is gone NCCL may wait for it.

    Then let gloo's threads come to rest. One that gives back the last collective's tensors asks for the interpreter's
    lock; if it does so while the interpreter ends, it is ended in the middle of C++ code, which aborts a process that has
    done everything: one in some fifty runs of plain FSDP2.
    """
    if not dist.is_initialized():
        return
    thread = threading.Thread(target=dist.destroy_process_group, daemon=True)
    thread.start()
    thread.join(LEAVING)
    if thread.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    time.sleep(0.2)
