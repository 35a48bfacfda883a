"""How the rows of a call are put into slots: what is computed once, what is shared, how many rows run together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["Job", "Row", "Section", "common", "sections"]

MIN_SHARED = 96
"""Tokens of prompt that a row must share on average before attention over them apart pays for its extra operations."""


class Row(NamedTuple):
    """One completion to make: sample `sample` of prompt `prompt`."""

    prompt: int
    sample: int


class Job(NamedTuple):
    """Rows of one prompt that start together."""

    ids: tuple[int, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Section:
    """Jobs that use the same room, one after another as slots get free."""

    jobs: tuple[Job, ...]
    share: Literal["none", "job", "all"]
    """Whose tokens lie in shared room: nobody's, each job's prompt, or what all prompts begin with."""
    slots: int
    """Rows that run together."""
    places: int
    """Room of a slot for tokens of its own."""
    groups: int
    """Shared prompts that are held together."""
    shared_places: int
    """Room of each of them."""
    prefix: int
    """Tokens that all prompts begin with, computed once; 0 where it does not pay."""


def common(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with; at least one token of each stays out, as its hidden state is needed."""
    low, high, longest = min(prompts), max(prompts), min(map(len, prompts)) - 1
    # What the first and the last in lexicographic order share, all share.
    return next((i for i in range(longest) if low[i] != high[i]), longest)


def sections(prompts: Sequence[Sequence[int]], n: int, new: int, max_rows: int, batch_tokens: int) -> Iterator[Section]:
    """Cut a call into sections, longest prompts first.

    Args:
        prompts: token ids.
        n: samples of each.
        new: tokens that a row may grow by.
        max_rows: rows that run together at most.
        batch_tokens: places of all slots together at most (one row is always allowed).
    """
    rows: dict[tuple[int, ...], list[Row]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(tuple(prompt), []).extend(Row(i, j) for j in range(n))
    left = sorted(rows, key=lambda ids: (-len(ids), ids))
    while left:
        # Slots have room for the longest prompt: where that is twice what the next ones need, those get their own.
        limit = (len(left[0]) + new) / 2
        here = [ids for ids in left if len(ids) + new > limit]
        left = left[len(here) :]
        yield _section([(ids, rows[ids]) for ids in here], new, max_rows, batch_tokens)


def _section(found: Sequence[tuple[tuple[int, ...], list[Row]]], new: int, max_rows: int, batch_tokens: int) -> Section:
    longest, most = len(found[0][0]), max(len(rows) for _, rows in found)
    total = sum(len(rows) for _, rows in found)
    prefix = common([ids for ids, _ in found]) if len(found) > 1 else 0
    saved = sum(len(ids) * (len(rows) - 1) for ids, rows in found) / total
    if saved >= MIN_SHARED:
        size = max(1, min(most, max_rows, (batch_tokens - longest) // new))
        groups = max(1, min(batch_tokens // (longest + size * new), max_rows // size))
        jobs = _jobs(found, size)
        groups = min(groups, len(jobs))
        return Section(jobs, "job", groups * size, new, groups, longest, prefix)
    if prefix >= MIN_SHARED:
        slots = (batch_tokens - prefix) // (longest - prefix + new)
        slots = max(1, min(slots, max_rows, total))
        return Section(_jobs(found, slots), "all", slots, longest - prefix + new, 1, prefix, prefix)
    slots = max(1, min(batch_tokens // (longest + new), max_rows, total))
    return Section(_jobs(found, slots), "none", slots, longest + new, 0, 0, prefix)


def _jobs(found: Sequence[tuple[tuple[int, ...], list[Row]]], size: int) -> tuple[Job, ...]:
    """Jobs of at most `size` rows."""
    return tuple(
        Job(ids, tuple(rows[start : start + size])) for ids, rows in found for start in range(0, len(rows), size)
    )
