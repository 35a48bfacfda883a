"""Progress of a long action, with the time left: a bar on a terminal, plain lines in a log.

    with Progress("sft", total=40) as progress:
        for step in range(40):
            ...
            progress.update(step + 1, f"loss {loss:.2f}")

Plain output, at most one line in about five seconds, the first and the last update always:

    sft  12/40  loss 1.23  8.1 s/it  3m44s left

Bars of actions inside one another (a stage, an evaluation within it) share one display.
"""

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

__all__ = ["Progress", "bytes_text", "duration"]

INTERVAL = 5.0
"""Seconds between two plain lines."""
WINDOW = 20
"""Updates whose mean rate is the estimate: recent enough to follow a change, long enough to be steady."""


def duration(seconds: float) -> str:
    """Seconds for people: `44s`, `3m44s`, `2h05m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def bytes_text(number: float) -> str:
    """Bytes for people: `512 B`, `28.8 GB`, `4.87 TB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


class _Display:
    """The one rich display of this process, alive while any bar is; rich refuses a second one."""

    def __init__(self) -> None:
        self.bars: Any = None
        self.users = 0

    def add(self, label: str, total: int, done: int, stream: TextIO) -> int:
        if self.bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bars

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self.bars = Bars(*columns, console=Console(file=stream))
            self.bars.start()
        self.users += 1
        return self.bars.add_task(label, total=total, completed=done, text="")

    def update(self, task: int, done: int, text: str) -> None:
        self.bars.update(task, completed=done, text=text)

    def remove(self, task: int) -> None:
        self.bars.stop_task(task)
        self.users -= 1
        if self.users == 0:
            self.bars.stop()
            self.bars = None


_display = _Display()


class Progress:
    """Shows how far a long action is and how long it will still take.

    Args:
        label: name of the action.
        total: number of iterations of the whole action.
        done: iterations finished before this start (a resumed run); they do not count for the rate.
        stream: where to write; standard error by default.
        clock: seconds, monotonic.
        unit: what an iteration is called in the rate.
    """

    def __init__(
        self,
        label: str,
        total: int,
        done: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        unit: str = "it",
    ) -> None:
        self.unit = unit
        self.label, self.total, self.done = label, total, done
        self.stream = stream or sys.stderr
        self.clock = clock
        self._marks: deque[tuple[float, int]] = deque(maxlen=WINDOW + 1)
        self._task: int | None = None
        self._shown_at: float | None = None
        self._pending = ""

    def __enter__(self) -> "Progress":
        self._marks.append((self.clock(), self.done))
        if self.stream.isatty():
            self._task = _display.add(self.label, self.total, self.done, self.stream)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._task is not None:
            _display.remove(self._task)
            self._task = None
        elif self._pending:
            self._write(self._pending)

    @property
    def seconds_per_iteration(self) -> float | None:
        """Mean over the recent updates; None before there is one."""
        if not self._marks:
            return None
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        return (end - start) / (after - before) if after > before else None

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` of `total` iterations are finished, with a few words on how it goes."""
        now = self.clock()
        self.done = done
        self._marks.append((now, done))
        text = "  ".join(part for part in (note, *self._estimate()) if part)
        if self._task is not None:
            _display.update(self._task, done, text)
            return
        line = "  ".join(part for part in (self.label, f"{done}/{self.total}", text) if part)
        if self._shown_at is None or now - self._shown_at >= INTERVAL or done >= self.total:
            self._write(line)
            self._shown_at = now
        else:
            self._pending = line

    def _estimate(self) -> tuple[str, ...]:
        seconds = self.seconds_per_iteration
        if seconds is None:
            return ()
        rate = f"{seconds:.1f} s/{self.unit}" if seconds >= 1 or seconds == 0 else f"{1 / seconds:.1f} {self.unit}/s"
        return rate, f"{duration(seconds * max(0, self.total - self.done))} left"

    def _write(self, line: str) -> None:
        print(line, file=self.stream, flush=True)
        self._pending = ""
