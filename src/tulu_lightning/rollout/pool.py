"""The scoring pool: verifiers in processes of their own that can be killed, so that no response can hang or end a run.

The processes hold no torch and none of this process's memory: one is started as a fresh interpreter (`pool_template`),
and the workers are forked from it. This process measures the time of each call and has a worker that goes over it killed.
"""

import json
import os
import pickle
import select
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, get_args

from tulu_lightning.errors import InputError
from tulu_lightning.rollout.pool_processes import Processes
from tulu_lightning.rollout.pool_system import read_frame, write_frame
from tulu_lightning.types import Outcome, Verdict
from tulu_lightning.verifiers.registry import Verifier

__all__ = ["Answer", "Call", "Pool", "PoolLimits"]

OUTCOMES = get_args(Outcome)
REMEDY = 'Define its class at the top of a module that can be imported, or give it `runs = "here"`.'


@dataclass(frozen=True)
class PoolLimits:
    """What the scoring pool may use.

    Args:
        workers: processes; by default one for each core that this process may use (divided by the processes that share
            the machine, where a launcher says how many).
        seconds: wall-clock time of one call; a worker that goes over it is killed, and the outcome is `timeout`.
        memory_mb: address space of a worker; going over it is a `timeout` too.
        recycle: calls after which a worker is replaced.

    Raises:
        InputError: a value is out of range.
    """

    workers: int | None = None
    seconds: float = 5.0
    memory_mb: int = 1024
    recycle: int = 10_000

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("memory_mb", 256), ("recycle", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise InputError(f"scoring.{name}", f"is {value!r}", f"Use a whole number of at least {least}.")
        if not 0 < self.seconds < float("inf"):
            raise InputError("scoring.seconds", f"is {self.seconds!r}", "Use a number above 0.")

    @property
    def processes(self) -> int:
        """Workers that will run."""
        if self.workers is not None:
            return self.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class Call(NamedTuple):
    """One call of a verifier."""

    name: str
    """Of the verifier, for messages."""
    verifier: Verifier
    response: str
    target: str


class Answer(NamedTuple):
    """What came of a call."""

    verdict: Verdict
    trouble: str = ""
    """What went wrong, or empty."""


class _Worker:
    """A worker as seen from here, and the call that it has."""

    def __init__(self, pid: int, connection: socket.socket, generation: int) -> None:
        self.pid, self.connection, self.generation = pid, connection, generation
        self.calls = 0
        self.place = -1
        self.name = ""
        self.deadline = 0.0


class Pool:
    """Processes that call verifiers. Starts at the first call; close it at the end.

    One caller at a time: a second thread waits.

    Args:
        limits: time, memory and number of the processes.
    """

    def __init__(self, limits: PoolLimits | None = None) -> None:
        self.limits = limits or PoolLimits()
        self.ended = 0
        """Workers that were killed, died or were replaced, so far."""
        self._processes = Processes(self.limits.memory_mb)
        self._lock = threading.RLock()
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []
        self._pickled: dict[int, tuple[Verifier, bytes]] = {}
        self._generation = 0
        self._owner = os.getpid()

    @property
    def processes(self) -> int:
        """Workers that are there now."""
        return len(self._idle) + len(self._busy)

    def run(self, calls: Iterable[tuple[int, Call]]) -> Iterator[tuple[int, Answer]]:
        """Answers, in the order in which they come; each with the number that its call came with.

        Calls are taken from the iterable only as workers become free. A call that hangs costs one worker one time limit.

        Raises:
            InputError: a verifier cannot be sent to another process or loaded there, or no process can be started.
        """
        with self._lock:
            self._forget_if_forked()
            waiting = iter(calls)
            more = True
            try:
                while more or self._busy:
                    while more and len(self._busy) < self.limits.processes:
                        item = next(waiting, None)
                        more = item is not None
                        if item is not None and not self._begin(*item):
                            yield item[0], Answer(Verdict("error", 0.0), "the worker died before it read the call")
                    yield from self._collect()
            finally:
                for worker in list(self._busy):  # the caller stopped before the end
                    self._end(worker)

    def warm(self, name: str, verifier: Verifier, target: str) -> None:
        """Start what the first call of a verifier would start, so that the call does not wait for it.

        Args:
            name: of the verifier, for messages.
            verifier: the one to load.
            target: a ground truth of its kind, on which it is called once.

        Raises:
            InputError: as for `run`.
        """
        with self._lock:
            self._forget_if_forked()
            self._prepare(Call(name, verifier, "", target))
            fresh = [self._free_worker() for _ in range(self.limits.processes)]
            self._idle.extend(fresh)

    def close(self) -> None:
        """End all processes. A later call starts them again."""
        with self._lock:
            self._forget_if_forked()
            for worker in self._idle:
                worker.connection.close()
            self._idle.clear()
            self._processes.stop()

    def _begin(self, place: int, call: Call) -> bool:
        """Give a worker the call; False if it was gone."""
        pickled = self._prepare(call)
        worker = self._free_worker()
        worker.place, worker.name, worker.calls = place, call.name, worker.calls + 1
        worker.deadline = time.monotonic() + self.limits.seconds
        self._busy.append(worker)
        try:
            worker.connection.settimeout(self.limits.seconds)
            write_frame(worker.connection, pickle.dumps((pickled, call.response, call.target), protocol=5))
        except OSError:
            self._end(worker)
            return False
        return True

    def _prepare(self, call: Call) -> bytes:
        """The call's verifier, pickled once, and called once in the process that workers are forked from."""
        kept = self._pickled.get(id(call.verifier))
        if kept is None:  # the verifier is kept too, or its id could become another's
            kept = self._pickled[id(call.verifier)] = (call.verifier, _pickled(call))
        if self._processes.rehearse(call.name, kept[1], call.target):
            self._generation += 1
        return kept[1]

    def _collect(self) -> Iterator[tuple[int, Answer]]:
        """Wait for the next answer or the next time limit."""
        if not self._busy:
            return
        wait = max(0.0, min(worker.deadline for worker in self._busy) - time.monotonic())
        readable = _readable([worker.connection for worker in self._busy], wait)
        now = time.monotonic()
        for worker in list(self._busy):
            if worker.connection.fileno() in readable:
                yield worker.place, self._answer(worker)
            elif now >= worker.deadline:
                self._end(worker)
                yield worker.place, Answer(Verdict("timeout", 0.0), f"over {self.limits.seconds:g} seconds")

    def _answer(self, worker: _Worker) -> Answer:
        try:
            outcome, score, trouble, imported = json.loads(read_frame(worker.connection) or b"null")
        except (OSError, ValueError, TypeError):
            self._end(worker)
            return Answer(Verdict("error", 0.0), "the worker died")
        self._busy.remove(worker)
        self._idle.append(worker)
        if imported:
            self._processes.learn(imported)
            self._generation += 1
        if outcome == "unusable":
            what = f"a process of the scoring pool cannot load it ({trouble})"
            raise InputError(f"verifier {worker.name!r}", what, REMEDY)
        if outcome not in OUTCOMES or not 0.0 <= score <= 1.0:
            return Answer(Verdict("error", 0.0), f"it answered outcome {outcome!r}, score {score!r}")
        return Answer(Verdict(outcome, score), trouble)

    def _free_worker(self) -> _Worker:
        """An idle worker that is fit for another call, or a new one."""
        while self._idle:
            worker = self._idle.pop()
            gone = _readable([worker.connection], 0)  # an idle worker has nothing to say but that it ended
            if not gone and worker.generation == self._generation and worker.calls < self.limits.recycle:
                return worker
            self._end(worker)
        return _Worker(*self._processes.fork(), self._generation)

    def _end(self, worker: _Worker) -> None:
        """Have a worker killed, with all that it started."""
        self.ended += 1
        if worker in self._busy:
            self._busy.remove(worker)
        worker.connection.close()
        self._processes.end(worker.pid)

    def _forget_if_forked(self) -> None:
        """In a process forked from the one that started the pool, its processes are someone else's: start own ones."""
        if self._owner != os.getpid():
            self._owner = os.getpid()
            self._processes.forget()
            self._idle, self._busy = [], []


def _pickled(call: Call) -> bytes:
    kind = type(call.verifier)
    where = f"verifier {call.name!r}"
    if kind.__module__ == "__main__":
        what = f"{kind.__name__} is defined in the program that was started, which no other process can import"
        raise InputError(where, what, REMEDY)
    try:
        return pickle.dumps(call.verifier, protocol=5)
    except Exception as error:
        raise InputError(where, f"cannot be sent to another process ({error})", REMEDY) from error


def _readable(connections: list[socket.socket], wait: float) -> set[int]:
    """File descriptors that have something to read, or whose other side is gone; waits for the first one."""
    poll = select.poll()
    for connection in connections:
        poll.register(connection, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(wait * 1000 + (wait > 0))}
