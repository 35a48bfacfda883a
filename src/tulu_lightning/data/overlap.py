"""Which training rows overlap with which test items: `core.ngrams` for many rows at once.

The rows' n-grams are looked up in an index of the evaluation sets. What is found there is a place in a test text, so how
much of a text a row covers follows from the sorted places. Pairs above the threshold are then counted once more to the letter, so that no
chance of two hashes decides anything.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tulu_lightning.core import ngrams
from tulu_lightning.data.ngram_hash import Array, Hashed, hashed, ngram_hashes, whole_hashes
from tulu_lightning.data.ngram_index import Index

__all__ = ["Overlaps", "Rule", "overlaps"]

PIECE = 4_000_000
"""Places that are sorted at once: one n-gram that all items of a set begin with has as many of them as there are items."""


class Rule(NamedTuple):
    """When an item overlaps with a row."""

    mode: str = "ngram"
    """`ngram` or `exact`."""
    short: str = "whole"
    """Of `ngram`: texts with fewer tokens than an n-gram match a turn that is the same as a `whole`, or `never`."""
    above: float = 0.5
    """Its share of matched tokens is above this one."""


class Overlaps(NamedTuple):
    """Pairs of a row and a test item, sorted by row, then item."""

    rows_P: Array
    """Number of the row among those given; int64."""
    items_P: Array
    """Number of the item over all sets of the index; int64."""
    shares_P: Array
    """Share of the item's tokens that match; float64."""


def overlaps(index: Index, rows: Sequence[Sequence[str]], rule: Rule) -> Overlaps:
    """The pairs above the threshold.

    Args:
        index: of the evaluation sets.
        rows: the turns of each row.
        rule: mode and threshold.
    """
    texts = [turn for row in rows for turn in row]
    text_rows = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    found = hashed(texts)
    parts = [] if rule.mode == "exact" else [_covered(index, *piece) for piece in _pieces(index, found, text_rows)]
    if rule.mode == "exact" or rule.short == "whole":
        parts.append(_whole(index, found, text_rows, short=rule.mode != "exact"))
    if not parts:
        return Overlaps(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    text_rows, fields, shares = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((fields, text_rows))
    rows_P, items_P, shares_P = _by_item(index, text_rows[order], fields[order], shares[order])
    near = shares_P > rule.above - 1e-9  # to the letter below
    return _literal(index, rows, rule, rows_P[near], items_P[near])


def _pieces(index: Index, found: Hashed, text_rows: Array) -> Iterator[tuple[Array, Array]]:
    """(row, place in the test texts) of what is shared, sorted, no row in two pieces."""
    values, at = ngram_hashes(found, index.n)
    which, slots = index.find(values)
    rows = text_rows[found.texts_T[at[which]]]
    pairs = np.unique(rows * np.int64(len(index.hashes) or 1) + slots)
    rows, slots = np.divmod(pairs, np.int64(len(index.hashes) or 1))
    counts = index.begins[slots + 1] - index.begins[slots]
    sums = np.cumsum(counts)
    start = 0
    while start < len(rows):
        before = sums[start - 1] if start else 0
        end = int(np.searchsorted(sums, before + PIECE, side="right"))
        # To the end of a row: not to have one in two pieces.
        end = int(np.searchsorted(rows, rows[max(end - 1, start)], side="right"))
        many = counts[start:end]
        first = np.repeat(index.begins[slots[start:end]], many)
        within = np.arange(int(many.sum())) - np.repeat(np.cumsum(many) - many, many)
        piece_rows, places = np.repeat(rows[start:end], many), index.places[first + within]
        order = np.lexsort((places, piece_rows))
        yield piece_rows[order], places[order]
        start = end


def _covered(index: Index, rows: Array, places: Array) -> tuple[Array, Array, Array]:
    """(row, field, share of its tokens that match), by the places at which shared n-grams begin."""
    fields = np.searchsorted(index.fields, places, side="right") - 1
    begins = _begins(rows, fields)
    new = np.minimum(np.diff(places, prepend=0), index.n)  # tokens that the n-gram before did not cover
    new[begins] = index.n
    counts = np.add.reduceat(new, begins) if len(new) else new
    rows, fields = rows[begins], fields[begins]
    return rows, fields, counts / (index.fields[fields + 1] - index.fields[fields])


def _whole(index: Index, found: Hashed, text_rows: Array, short: bool) -> tuple[Array, Array, Array]:
    values, of = whole_hashes(found)
    low, high = (np.searchsorted(index.wholes, values, side=side) for side in ("left", "right"))
    many = high - low
    first = np.repeat(low, many)
    within = np.arange(int(many.sum())) - np.repeat(np.cumsum(many) - many, many)
    pairs = np.stack([np.repeat(text_rows[of], many), index.whole_fields[first + within]])
    if short:
        pairs = pairs[:, (index.fields[pairs[1] + 1] - index.fields[pairs[1]]) < index.n]
    rows, fields = np.unique(pairs, axis=1)
    return rows, fields, np.ones(len(rows))


def _by_item(index: Index, rows: Array, fields: Array, shares: Array) -> tuple[Array, Array, Array]:
    """(row, item, share): the mean over the item's fields, of which those that are not here are 0."""
    items = index.field_items[fields]
    begins = _begins(rows, items)
    sums = np.add.reduceat(shares, begins) if len(shares) else shares
    rows, items = rows[begins], items[begins]
    return rows, items, sums / (index.items[items + 1] - index.items[items])


def _begins(*columns: Array) -> Array:
    """Where a new combination of values begins."""
    if not len(columns[0]):
        return np.zeros(0, np.int64)
    new = np.ones(len(columns[0]), bool)
    new[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return np.flatnonzero(new)


def _literal(index: Index, rows: Sequence[Sequence[str]], rule: Rule, rows_P: Array, items_P: Array) -> Overlaps:
    kept: list[tuple[int, int, float]] = []
    share: Callable[[list[list[str]]], float] | None = None
    last = -1
    for row, item in zip(rows_P.tolist(), items_P.tolist(), strict=True):
        if row != last:
            last, share = row, literal_share(rows[int(row)], rule, index.n)
        assert share is not None
        if (found := share(index.item_tokens(item))) > rule.above:
            kept.append((row, item, found))
    columns = list(zip(*kept, strict=True)) or [(), (), ()]
    return Overlaps(np.array(columns[0], np.int64), np.array(columns[1], np.int64), np.array(columns[2], np.float64))


def literal_share(row: Sequence[str], rule: Rule, n: int) -> Callable[[list[list[str]]], float]:
    """For one row: the share of an item, given by its fields' tokens, as `core.ngrams` counts it."""
    turns = [ngrams.tokens(turn) for turn in row]
    if rule.mode == "exact":
        return lambda fields: ngrams.whole_share(fields, turns)
    seen = ngrams.grams(turns, n)
    return lambda fields: ngrams.item_share(fields, seen, n, turns if rule.short == "whole" else ())
