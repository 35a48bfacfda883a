"""Verifiers that misbehave on demand, for tests of the scoring pool; its processes import this module by name."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import ClassVar

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
class Threaded(Obedient):
    runs: ClassVar = "thread"
    concurrency: int = 3


def hang(_: str) -> Verdict:
    while True:  # in C code, where no signal handler of Python's would run
        sum(range(10**8))


def die(number: str) -> Verdict:
    os.kill(os.getpid(), int(number))
    raise AssertionError


def bomb(_: str) -> Verdict:
    kept = []
    while True:
        kept.append(bytearray(10**7))


def forks(marker: str) -> Verdict:
    """Leaves a process in a session of its own, which writes its number to a file and sleeps."""
    command = "import os,sys,time; open(sys.argv[1],'a').write(f'{os.getpid()}\\n'); time.sleep(600)"
    for _ in range(3):
        subprocess.Popen([sys.executable, "-S", "-c", command, marker], start_new_session=True)
    while not os.path.exists(marker) or len(open(marker).read().split()) < 3:
        time.sleep(0.02)
    return Verdict("right", 1.0)


def forks_and_hangs(marker: str) -> Verdict:
    forks(marker)
    return hang("")


def facts(_: str) -> Verdict:
    """Raises what a worker is: the test reads it in the log."""
    held = sorted(os.readlink(f"/proc/self/fd/{n}").split(":")[0] for n in os.listdir("/proc/self/fd") if int(n) < 3)
    raise RuntimeError(f"pid={os.getpid()} torch={'torch' in sys.modules} main={hasattr(sys.modules['__main__'], 'pytest')} {held} {sorted(k for k in os.environ if 'KEY' in k)}")


def bad_answer(text: str) -> Verdict:
    return {"outcome": Verdict("perhaps", 1.0), "score": Verdict("right", 7.0), "nan": Verdict("right", float("nan"))}[text]  # type: ignore[arg-type]


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
