"""The processes of the scoring pool, seen from the process that uses them: start, fork, end."""

import contextlib
import json
import logging
import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

from tulu_lightning.errors import InputError
from tulu_lightning.rollout.pool_system import write_frame

__all__ = ["Forked", "Processes"]

log = logging.getLogger(__name__)

START_SECONDS = 60.0
"""For an answer of the template, which does nothing that could take long, on a busy machine."""
REHEARSAL_SECONDS = 60.0
"""For a verifier to be called for the first time: imports, on a busy machine."""
SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)


class Forked(NamedTuple):
    """A worker that has just been started."""

    pid: int
    connection: socket.socket


class Processes:
    """A template process and the workers forked from it. Starts when first asked for one; stop it at the end.

    Args:
        memory_mb: address space of each process.
    """

    def __init__(self, memory_mb: int) -> None:
        self.memory_mb = memory_mb
        self._template: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._rehearsed: dict[bytes, tuple[str, str]] = {}
        self._skipped: set[bytes] = set()
        self._learned: list[str] = []

    def rehearse(self, name: str, pickled: bytes, target: str) -> bool:
        """Have the template call a verifier once, so that workers start with what it loads.

        Args:
            name: of the verifier, for messages.
            pickled: the verifier.
            target: a ground truth; the response is the same text.

        Returns:
            Whether it was new: workers forked before do not have what it loaded.

        Raises:
            InputError: the template cannot load it, or cannot be started.
        """
        if pickled in self._rehearsed:
            return False
        self._rehearsed[pickled] = (name, target)
        if self._template is None or not self._call_once(pickled):
            self._start()
        return True

    def learn(self, modules: list[str]) -> None:
        """Have the template import what a worker had to import in the middle of a call: that cost the call its time."""
        self._learned += modules
        with contextlib.suppress(OSError):  # a template that is gone imports them when it is started again
            self._ask("learn", self._learned)

    def fork(self) -> Forked:
        """A new worker.

        Raises:
            InputError: none can be started.
        """
        for _ in range(2):
            if self._template is None:
                self._start()
            assert self._control is not None
            with contextlib.suppress(OSError, ValueError):
                write_frame(self._control, pickle.dumps(("fork",)))
                told, descriptors, *_ = socket.recv_fds(self._control, 4096, 1)
                if descriptors:
                    return Forked(json.loads(told)["pid"], socket.socket(fileno=descriptors[0]))
            log.warning("the scoring pool's first process ended, and its workers with it; starting another")
            self.stop()
        raise InputError("scoring pool", "its processes end as soon as they start", "Give it more memory (memory_mb).")

    def end(self, pid: int) -> None:
        """Kill a worker, with all that it started; nothing if the template is gone, which takes its workers along."""
        with contextlib.suppress(OSError, ValueError):
            self._ask("end", pid)

    def stop(self) -> None:
        """End the template and all workers."""
        if self._control is not None:
            self._control.close()
        if self._template is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it sees the end of the connection and ends them all
                self._template.wait(2)
            self._template.kill()
            self._template.wait()
        self._control = self._template = None

    def forget(self) -> None:
        """Leave the processes to the process that started them, of which this one is a fork."""
        self._control = self._template = None

    def _start(self) -> None:
        """A template that has called all verifiers of before; one that does not come back from its call is left out."""
        while True:
            self.stop()
            self._launch()
            self.learn([])
            if all(self._call_once(pickled) for pickled in self._rehearsed):
                return

    def _call_once(self, pickled: bytes) -> bool:
        if pickled in self._skipped:
            return True
        name, target = self._rehearsed[pickled]
        try:
            trouble = self._ask("rehearse", pickled, target, seconds=REHEARSAL_SECONDS)["trouble"]
        except OSError:
            log.warning("verifier %r hung or died on the text of its own target %.100r", name, target)
            self._skipped.add(pickled)
            return False
        if trouble:
            del self._rehearsed[pickled]
            what = f"a process of the scoring pool cannot load it ({trouble})"
            raise InputError(f"verifier {name!r}", what, "Define its class in a module that can be imported.")
        return True

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        with tempfile.TemporaryFile() as told, theirs:
            # -P: a file in the working folder must not pass for a module of the standard library.
            command = [sys.executable, "-P", "-m", "tulu_lightning.rollout.pool_template"]
            self._template = subprocess.Popen(
                [*command, str(theirs.fileno()), str(self.memory_mb)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=told,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=_environment(),
            )
            theirs.close()
            self._control = ours
            ours.settimeout(START_SECONDS)
            try:
                if ours.recv(4096):
                    return
            except OSError:  # no answer in time
                pass
            self.stop()
            told.seek(0)
            what = f"its first process does not start: {told.read().decode(errors='replace').strip()[-500:]}"
            raise InputError("scoring pool", what, "Give it more memory (memory_mb), or mend the installation.")

    def _ask(self, *message: Any, seconds: float = START_SECONDS) -> dict[str, Any]:
        if self._control is None:
            raise OSError("there is no template")
        write_frame(self._control, pickle.dumps(message))
        self._control.settimeout(seconds)
        told = self._control.recv(65536)
        self._control.settimeout(START_SECONDS)
        if not told:
            raise OSError("the template ended")
        return json.loads(told)


def _environment() -> dict[str, str]:
    """This process's environment without keys, with its module search path, and one thread for each library."""
    kept = {name: value for name, value in os.environ.items() if not SECRET.search(name)}
    path = [os.path.abspath(entry) for entry in sys.path]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**kept, **threads, "PYTHONPATH": os.pathsep.join(path)}
