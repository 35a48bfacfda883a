"""The value that most answers state (self-consistency: Wang et al. 2023)."""

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["majority"]


def majority(values: Sequence[str | None], equal: Iterable[tuple[Any, Any]]) -> tuple[str | None, list[int]]:
    """The value that most of the answers state, as the first of them writes it, and which answers state it.

    None where two values have as many, or one answer alone states it among several.

    Args:
        values: of each answer; None where it states none.
        equal: pairs of values that are written differently and are the same.
    """
    same, groups = set(equal), list[list[int]]()
    for place, value in enumerate(values):
        if value is None:
            continue
        for group in groups:
            first = values[group[0]]
            if value == first or (value, first) in same or (first, value) in same:
                group.append(place)
                break
        else:
            groups.append([place])
    groups.sort(key=len, reverse=True)
    if not groups or (len(groups) > 1 and len(groups[0]) == len(groups[1])) or (len(values) > 1 and len(groups[0]) < 2):
        return None, []
    return values[groups[0][0]], groups[0]
