"""Which rows of a source go into a mixture, and how often: pure functions of the seed, the source's name and numbers.

A sample drawn with `count` or `cap` is the beginning of one shuffled order, so that a larger one contains a smaller one,
and a row that turns out unusable is replaced by the next. `fraction` takes its share of all rows before any is read.
"""

import hashlib
import math
from collections.abc import Sequence

import torch

from tulu_lightning.data.sources import Source, check_settings
from tulu_lightning.errors import InputError

__all__ = ["order", "repeats", "wanted"]


def order(source: Source, total: int, seed: int) -> Sequence[int]:
    """Indices of the rows to try, in the order in which they are tried.

    Args:
        source: with at most one of `fraction`, `count` and `cap`.
        total: rows that it has.
        seed: of the mixture.

    Returns:
        Different indices from 0 to below `total`: all of them in their own order if nothing has to be drawn.

    Raises:
        InputError: settings out of range, a `count` above `total`, or a `fraction` that rounds to no row.
    """
    check_settings(source)
    where = f"source {source.name!r}"
    if source.fraction is not None:
        rows = _rounded(source.fraction * total)
        if not rows:
            what = f"fraction is {source.fraction}, which of {total} rows is none"
            raise InputError(where, what, "Raise it, or leave the source out.")
        # In the rows' own order: the set is what is drawn, and reading forward is faster.
        return sorted(_shuffled("order", source, total, seed)[:rows]) if rows < total else range(total)
    if source.count is not None and source.count > total:
        what = f"count is {source.count}, and the source has {total} rows"
        raise InputError(where, what, f"Use at most {total}, or cap, which takes what is there; or upsample.")
    drawn = wanted(source, total)
    return _shuffled("order", source, total, seed) if drawn is not None and drawn < total else range(total)


def wanted(source: Source, total: int) -> int | None:
    """How many usable rows are enough (`count` or `cap`), or None to try all of `order`."""
    if source.count is not None:
        return source.count
    return None if source.cap is None else min(source.cap, total)


def repeats(source: Source, kept: int, seed: int) -> Sequence[int]:
    """Indices into the kept rows, up-sampling applied.

    Args:
        source: with `upsample` u.
        kept: usable rows.
        seed: of the mixture; decides which rows the fractional part of u repeats.

    Returns:
        u·kept indices (half a row counts as one): each of 0 to kept - 1 in turn, as often as u has whole parts, then
        those that are used once more. 24 rows and u = 10 give 240; 4 rows and u = 2.5 give 10.
    """
    check_settings(source)
    whole = math.floor(source.upsample)
    more = _rounded(source.upsample * kept) - whole * kept
    if whole == 1 and not more:
        return range(kept)
    again = sorted(_shuffled("repeats", source, kept, seed)[:more]) if more else []
    return [*list(range(kept)) * whole, *again]


def _shuffled(what: str, source: Source, total: int, seed: int) -> list[int]:
    text = f"{what}\n{seed}\n{source.name}\n{total}".encode()
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))
    return torch.randperm(total, generator=generator).tolist()


def _rounded(value: float) -> int:
    """To the nearest whole number, halves up; with slack for products such as 0.145·100, which is below its half."""
    return math.floor(value + 0.5 + 1e-9)
