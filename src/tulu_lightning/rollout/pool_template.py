"""The process that workers of the scoring pool are forked from: `python -m tulu_lightning.rollout.pool_template FD MB`.

It has one thread, no torch, and has loaded what the verifiers load, so a worker that starts has sympy and the like and
costs milliseconds. It ends its workers, and ends with its parent.
"""

import contextlib
import gc
import importlib
import json
import os
import pickle
import select
import signal
import socket
import sys
from typing import Any

from tulu_lightning.rollout import pool_system as system
from tulu_lightning.rollout.pool_worker import load, serve

__all__ = ["main"]

LOOK = 0.5
"""Seconds between two looks at whether the parent still lives."""


class Template:
    """Obeys the pool: `rehearse`, `learn`, `fork`, `end`. Every message is pickled, and answered.

    Args:
        control: to the pool.
    """

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.workers: set[int] = set()
        self.known: dict[bytes, Any] = {}

    def run(self) -> None:
        """Until the parent is gone."""
        parent = os.getppid()
        # The connection ends with the parent, unless a process that the parent forked holds it open too.
        while os.getppid() == parent:
            if not select.select([self.control], [], [], LOOK)[0]:
                continue
            frame = system.read_frame(self.control)
            if frame is None:
                return
            name, *arguments = pickle.loads(frame)
            getattr(self, f"_{name}")(*arguments)

    def close(self) -> None:
        """End all workers and what they left."""
        system.end_children()

    def _rehearse(self, pickled: bytes, target: str) -> None:
        """Warm a verifier, or call it once: what it imports, reads and caches is then there in every worker."""
        trouble = ""
        try:
            verifier = load(pickled, self.known)
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
        else:
            with contextlib.suppress(Exception):
                verifier.warm() if hasattr(verifier, "warm") else verifier(target, target)
            system.end_children(keep=self.workers)
        self._settle(trouble)

    def _learn(self, modules: list[str]) -> None:
        """Import what a worker had to import in the middle of a call."""
        for name in modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        self._settle("")

    def _settle(self, trouble: str) -> None:
        gc.collect()
        gc.freeze()  # so that a worker's collector does not touch, and thereby copy, what it shares with this process
        self._say({"trouble": trouble})

    def _fork(self) -> None:
        """Start a worker and hand over its connection."""
        ours, theirs = socket.socketpair()
        template = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                system.die_with_parent(template)
                system.adopt_orphans()
                self.control.close()
                ours.close()
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the template's tells why a start failed
                serve(theirs)
            finally:
                os._exit(0)
        theirs.close()
        self.workers.add(pid)
        socket.send_fds(self.control, [json.dumps({"pid": pid}).encode()], [ours.fileno()])
        ours.close()

    def _end(self, pid: int) -> None:
        """Kill a worker with all that it started."""
        self.workers.discard(pid)
        system.end_group(pid)
        system.end_children(keep=self.workers)
        self._say({"trouble": ""})

    def _say(self, answer: dict[str, Any]) -> None:
        self.control.sendall(json.dumps(answer).encode())


def main(descriptor: int, memory_mb: int) -> None:
    """Serve the pool at the other end of an inherited socket.

    Args:
        descriptor: of the socket.
        memory_mb: address space of this process and of each worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    system.limit_memory(memory_mb)
    system.adopt_orphans()
    with socket.socket(fileno=descriptor) as control:
        template = Template(control)
        try:
            control.sendall(b"{}")
            template.run()
        except OSError:  # the parent closed while it was being answered
            pass
        finally:
            template.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
