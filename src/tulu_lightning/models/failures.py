"""What ends a run of several ranks, in words: which ranks, why, and who waits for whom."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

__all__ = ["Failure", "await_all", "first_line", "follows", "names", "of_the_connection", "say", "too_long"]

SILENT = "gives no answer (stopped, or in a call that lets no other thread run)"


class Failure(NamedTuple):
    """Why the run ends."""

    ranks: tuple[int, ...]
    """Those that failed, or that the others wait for."""
    text: str


def names(ranks: Sequence[int]) -> str:
    """`rank 1`, `ranks 1, 3 and 5`; of more than eight, the first ones and how many more."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown, more = [str(rank) for rank in ranks[:8]], len(ranks) - 8
    last = f"{more} more" if more > 0 else shown.pop()
    return f"ranks {', '.join(shown)} and {last}"


def await_all(store: Any, rank: int, world: int, seconds: float, say: Callable[[str], None]) -> None:
    """Wait until every rank has come here; says each minute for whom.

    Args:
        store: a store that every rank reaches.
        rank: this one.
        world: how many there are.
        seconds: how long to wait.
        say: told for whom it waits.

    Raises:
        RuntimeError: some did not come; names them.
    """
    keys = [f"came/{other}" for other in range(world)]
    store.set(keys[rank], "")
    start = told = time.monotonic()
    while not store.check(keys):  # one question for all: there may be hundreds
        now = time.monotonic()
        if now - start > seconds or now - told >= 60:
            told = now
            missing = names([other for other, key in enumerate(keys) if not store.check([key])] or [rank])
            if now - start > seconds:
                remedy = "look into their output, and whether all were told the same address and port"
                raise RuntimeError(f"rank {rank} waited {now - start:.0f} s for {missing} to start; {remedy}")
            say(f"rank {rank} of {world} has waited {now - start:.0f} s for {missing} to start")
        time.sleep(0.1)


def too_long(places: dict[int, list[str]], world: int, seconds: float) -> Failure:
    """Who waits for whom, by what each rank says about its main thread: (1 if it waits for the others, where it is)."""
    waiting = [rank for rank, (waits, _) in places.items() if waits == "1"]
    missing = [rank for rank in range(world) if rank not in waiting]
    ways: dict[str, list[int]] = {}
    for rank in range(world):
        ways.setdefault(places.get(rank, ["", SILENT])[1], []).append(rank)
    told = "; ".join(f"{names(ranks)}: {place}" for place, ranks in ways.items())
    what = f"for {names(missing)}" if missing else "for each other in different places"
    return Failure(tuple(missing), f"{names(waiting or [0])} waited {seconds:.0f} s {what}. {told}")


def first_line(error: BaseException) -> str:
    """An error's class and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}".rstrip(": ")


def follows(error: BaseException, failure: Failure) -> bool:
    """Whether a rank's error says no more than another's failure: that it is gone, or the same."""
    return of_the_connection(error) or failure.text.endswith(first_line(error))


def of_the_connection(error: BaseException) -> bool:
    """Whether an error is one that a rank gets when another one has left."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        mark in text for mark in ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    )


def say(text: str) -> None:
    """One line (or a block) for people, in one write: the output of several processes is one file."""
    sys.stderr.write(f"tulu: {text}\n")
    sys.stderr.flush()
