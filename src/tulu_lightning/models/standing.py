"""Where a process's main thread is, how long it has waited there, and whether another process still lives."""

import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType

import torch

__all__ = ["Standing", "gone", "namespace"]

DISTRIBUTED = f"{os.sep}torch{os.sep}distributed{os.sep}"
OWN = f"{os.sep}tulu_lightning{os.sep}"


class Standing:
    """The main thread, seen from another one."""

    def __init__(self) -> None:
        self._at: tuple[int, int] = (0, 0)
        self._since = time.monotonic()
        self._for_others = False

    def look(self) -> None:
        """Note where the main thread is; call this every second or so.

        It stands if its innermost frame is at the same instruction as the last time. That is a wait for others inside
        torch.distributed; and on a GPU everywhere, as a collective is started there and waited for later.
        """
        frame = _main()
        at = (0, 0) if frame is None else (id(frame), frame.f_lasti)
        if at != self._at:
            self._at, self._since = at, time.monotonic()
        self._for_others = any(DISTRIBUTED in f.f_code.co_filename for f in _outwards(frame)) or _on_gpu()

    @property
    def waits(self) -> float:
        """Seconds for which it has waited for other ranks at one place; 0 if it does not."""
        return time.monotonic() - self._since if self._for_others else 0.0

    def place(self) -> str:
        """Where it is, on one line: the innermost frame, and the innermost one of this package or of its user's code."""
        frames = list(_outwards(_main()))
        if not frames:
            return "not in Python"
        inner = frames[0]
        library = f"{os.sep}site-packages{os.sep}"
        caller = next((f for f in frames if OWN in f.f_code.co_filename or library not in f.f_code.co_filename), None)
        text = _line(inner)
        return text if caller in (None, inner) else f"{text}, called from {_line(caller)}"

    def stack(self) -> str:
        """The innermost part of its stack, as in a traceback."""
        return "".join(traceback.format_stack(_main(), limit=12))


def _main() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _outwards(frame: FrameType | None) -> "list[FrameType]":
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _line(frame: FrameType | None) -> str:
    assert frame is not None
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno} ({frame.f_code.co_name})"


def _on_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def namespace() -> str:
    """What, with the host's name, tells processes that see each other's ids; empty where the system does not say."""
    try:
        return f"{os.readlink('/proc/self/ns/pid')} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    except OSError:
        return ""


def gone(pid: int) -> bool:
    """Whether a process of this machine has ended, a zombie included. False where the system does not say."""
    if not Path("/proc/self/stat").exists():
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] in "ZX"
