"""What ranks tell each other beside training: shares of rollouts, metrics, and that something went wrong.

It goes over gloo groups of their own, so that a batch that is sampled ahead in a thread never meets the collectives of
the step that trains. Everything here is a collective: all ranks call it in the same order, each on its own thread.
"""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from tulu_lightning.errors import RunStopped
from tulu_lightning.ranks import data_place
from tulu_lightning.rollout.engine import EngineError

__all__ = ["ALONE", "Together", "in_order", "share_of"]

Result = TypeVar("Result")
Item = TypeVar("Item")


class Together:
    """The ranks of a run, as far as rollouts are concerned; one process is alone and waits for nobody.

    Args:
        rank: this process's place among those that have different rows.
        ranks: how many those are.
        group: process group of all processes; None when alone.
        seconds: longest wait for the others.
    """

    def __init__(self, rank: int = 0, ranks: int = 1, group: Any = None, seconds: float = 3600.0) -> None:
        self.rank, self.ranks, self._group, self._seconds = rank, ranks, group, seconds

    @classmethod
    def of(cls, trainer: Any, seconds: float) -> "Together":
        """The ranks of a trainer; opens a group, so all processes call it."""
        if trainer is None or trainer.world_size == 1:
            return cls()
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
        return cls(*data_place(trainer), group, seconds)

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self._group is None or dist.get_rank() == 0

    def gather(self, own: Result, what: str) -> list[Result]:
        """Everybody's, by rank; processes that share rows (tensor parallelism) give the same, and one of them counts.

        Args:
            own: this process's; it is pickled.
            what: for the message.

        Raises:
            RunStopped: the others did not come in time, or one of them ended.
        """
        if self._group is None:
            return [own]
        found: list[Any] = [None] * dist.get_world_size()
        started = time.monotonic()
        try:
            dist.all_gather_object(found, (self.rank, own), group=self._group)
        except RuntimeError as error:
            waited = time.monotonic() - started
            text = str(error).strip().splitlines()[0]
            raise RunStopped(
                f"rank {dist.get_rank()} waited {waited:.0f} s (at most {self._seconds:g}) for the other ranks' {what}: {text}"
            ) from error
        by_rank = dict(reversed(found))
        return [by_rank[rank] for rank in range(self.ranks)]

    def run(self, call: Callable[[], Result], what: str) -> Result:
        """The result of a call that every rank makes; if it fails on one of them, all of them raise.

        Args:
            call: without collectives that a failure would leave unanswered.
            what: for the message.

        Raises:
            EngineError: on all ranks, if an engine failed on any.
            RunStopped: another error on another rank. The rank's own error is raised as it is.
        """
        if self._group is None:
            return call()
        error: Exception | None = None
        result: Any = None
        try:
            result = call()
        except Exception as raised:
            error = raised
        told = None if error is None else (_kind(error), f"{type(error).__name__}: {error}")
        outcomes = self.gather(told, what)
        if error is not None:
            raise error
        for rank, outcome in enumerate(outcomes):
            if outcome is not None:
                kind, text = outcome
                raise kind(f"{what} failed on rank {rank}: {text}")
        return result


def _kind(error: Exception) -> Any:
    return EngineError if isinstance(error, EngineError) else RunStopped


ALONE = Together()
"""One process."""


def share_of(items: Sequence[Item], rank: int, ranks: int) -> list[Item]:
    """Every `ranks`-th item from the one at `rank`: neighbours, which are alike, go to different ranks."""
    return list(items[rank::ranks])


def in_order(shares: Sequence[Sequence[Item]]) -> list[Item]:
    """The items that `share_of` dealt, in their own order.

    Example: shares [0, 2, 4] and [1, 3] give [0, 1, 2, 3, 4].
    """
    total = sum(map(len, shares))
    return [shares[place % len(shares)][place // len(shares)] for place in range(total)]
