"""Verifiers that misbehave on demand, for tests of the scoring pool; its processes import this module by name."""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tulu_lightning.errors import InputError
from tulu_lightning.types import Verdict


@dataclass(frozen=True)
class Obedient:
    """Does what the response says; otherwise, right if response and target are equal."""

    runs: ClassVar = "pool"

    def __call__(self, response: str, target: str) -> Verdict:
        order, _, argument = response.partition(" ")
        if order in ORDERS:
            return ORDERS[order](argument)
        return Verdict("right", 1.0) if response == target else Verdict("wrong", 0.0)

    def complaint(self, target: str) -> str | None:
        return None


@dataclass(frozen=True)
class HangsOnItsTarget(Obedient):
    def __call__(self, response: str, target: str) -> Verdict:
        if response == "target":
            time.sleep(1000)
        return super().__call__(response, target)


@dataclass(frozen=True)
class Importing(Obedient):
    """Imports a module in the middle of a call, and is right if it was there already."""

    def __call__(self, response: str, target: str) -> Verdict:
        if response == target:
            return Verdict("wrong", 0.0)
        there = "xml.dom.minidom" in sys.modules and "asyncio" in sys.modules
        import asyncio  # noqa: F401 - some sixty modules
        import xml.dom.minidom  # noqa: F401

        return Verdict("right" if there else "wrong", float(there))


@dataclass(frozen=True)
class Warm(Importing):
    def warm(self) -> None:
        import asyncio  # noqa: F401
        import xml.dom.minidom  # noqa: F401


@dataclass(frozen=True)
class Threaded(Obedient):
    """Counts how many of it run at a time: the score is a hundredth of it."""

    runs: ClassVar = "thread"
    concurrency: int = 3

    def __call__(self, response: str, target: str) -> Verdict:
        if response == "down":
            raise InputError("server", "is down", "Start it.")
        with LOCK:
            RUNNING.append(1)
            most = len(RUNNING)
        time.sleep(0.02)
        with LOCK:
            RUNNING.pop()
        return Verdict("right", most / 100)


LOCK = threading.Lock()
RUNNING: list[int] = []


def hang(_: str) -> Verdict:
    while True:  # in C code, where no signal handler of Python's would run
        sum(range(10**9))


def die(number: str) -> Verdict:
    os.kill(os.getpid(), int(number))
    raise AssertionError


def bomb(_: str) -> Verdict:
    kept = []
    while True:
        kept.append(bytearray(10**7))


def forks(marker: str) -> Verdict:
    """Leaves three processes in sessions of their own, which write their numbers to a file and sleep."""
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            with open(marker, "a") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(600)
    while not os.path.exists(marker) or len(Path(marker).read_text().split()) < 3:
        time.sleep(0.02)
    return Verdict("right", 1.0)


def forks_and_hangs(marker: str) -> Verdict:
    forks(marker)
    return hang("")


def facts(_: str) -> Verdict:
    """Raises what a worker is: the test reads it in the log."""
    held = sorted(os.readlink(f"/proc/self/fd/{n}").split(":")[0] for n in os.listdir("/proc/self/fd") if int(n) < 3)
    keys = [name for name in os.environ if "KEY" in name]
    session = os.getsid(0) == os.getpid()
    raise RuntimeError(f"torch={'torch' in sys.modules} files={held} keys={keys} own session={session}")


def bad_answer(text: str) -> Verdict:
    return {"outcome": Verdict("perhaps", 1.0), "score": Verdict("right", 7.0), "nan": Verdict("right", float("nan"))}[
        text
    ]  # type: ignore[arg-type]


def pid(_: str) -> Verdict:
    return Verdict("right", os.getpid() / 2**32)


ORDERS = {
    "hang": hang,
    "die": die,
    "bomb": bomb,
    "forks": forks,
    "forks_and_hangs": forks_and_hangs,
    "facts": facts,
    "bad": bad_answer,
    "pid": pid,
    "stop": lambda _: die(str(int(signal.SIGSTOP))),
    "raise": lambda _: 1 // 0,
    "recurse": lambda text: ORDERS["recurse"](text),
}
