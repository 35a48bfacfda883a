"""How long the two sides of preference pairs are: a side that is longer more often is what DPO may learn instead."""

from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["PairLengths", "pair_lengths"]


class PairLengths(NamedTuple):
    """Lengths of the answers of a set of pairs."""

    pairs: int
    chosen: float
    """Mean tokens of a chosen answer, its end token included."""
    rejected: float
    """Mean tokens of a rejected answer."""
    chosen_longer: float
    """Share of the pairs whose chosen answer is the longer one."""
    rejected_longer: float
    """Share of the pairs whose rejected answer is the longer one; the rest are as long as each other."""


def pair_lengths(lengths: Iterable[tuple[int, int]]) -> PairLengths | None:
    """Sum up (chosen, rejected) lengths in tokens; None where there are none."""
    pairs = list(lengths)
    if not pairs:
        return None
    sums = [
        sum(chosen for chosen, _ in pairs),
        sum(rejected for _, rejected in pairs),
        sum(chosen > rejected for chosen, rejected in pairs),
        sum(chosen < rejected for chosen, rejected in pairs),
    ]
    return PairLengths(len(pairs), *(total / len(pairs) for total in sums))
