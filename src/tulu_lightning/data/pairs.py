"""Two encoded conversations to the three segments of a pair: what both begin with, and the rest of each.

Everything here is decided on token ids and loss weights, after rendering; where a turn begins plays no part in it.
"""

from typing import NamedTuple

import numpy as np

from tulu_lightning.core.reduce import PAIR
from tulu_lightning.data.encoding import Encoded, truncate
from tulu_lightning.data.rows import Array, Documents
from tulu_lightning.data.store import Part, Store

__all__ = ["SideLengths", "common_start", "cut", "parts", "side_lengths", "without_tail"]


class SideLengths(NamedTuple):
    """Lengths of the chosen and the rejected side of each pair (in this order, along the second axis); int64."""

    tokens: Array
    """All of a side, the common start included."""
    scored: Array
    """Those that get a log-prob."""


def without_tail(side: Encoded) -> Encoded:
    """A side up to its last scored token: nothing is read of what comes after it, such as ChatML's last newline."""
    end = next((at + 1 for at in range(len(side.ids) - 1, -1, -1) if side.weights[at] > 0), 0)
    return Encoded(side.ids[:end], side.weights[:end], tuple(each for each in side.ends if each <= end))


def common_start(chosen: Encoded, rejected: Encoded) -> int:
    """Tokens at the start that are the same on both sides, weights too; at least one token of each side is left over.

    Example: ids 5 6 7 8 and 5 6 9 have 2; 5 6 7 and 5 6 have 1.
    """
    most = min(len(chosen.ids), len(rejected.ids)) - 1
    tokens = zip(chosen.ids[:most], rejected.ids, chosen.weights, rejected.weights, strict=False)
    return next((at for at, (a, b, v, w) in enumerate(tokens) if a != b or v != w), most)


def cut(side: Encoded, shared: int, max_tokens: int) -> Encoded | None:
    """A side within `max_tokens`, or None if nothing of what tells it from the other would be left.

    As `encoding.truncate`, but of what both sides share nothing is dropped, so that at least one token and the end token
    of a differing answer stay. A side without ends is token ids that a sampler cut; it is cut behind any token.

    Args:
        side: a whole side.
        shared: `common_start` of both.
        max_tokens: longest side.

    Example: 10 shared tokens, then 5 and an end token of its own. Within 12: 11 tokens and the end token. Within 11: None.
    """
    if len(side.ids) <= max_tokens:
        return side
    if not side.ends:
        return Encoded(side.ids[:max_tokens], side.weights[:max_tokens], ()) if max_tokens > shared else None
    # With what is shared as context, the first answer to keep is the first that differs.
    found = truncate(side._replace(weights=[0.0] * shared + side.weights[shared:]), max_tokens)
    return found and found._replace(weights=[*side.weights[:shared], *found.weights[shared:]])


def parts(chosen: Encoded, rejected: Encoded, shared: int) -> tuple[Part, Part, Part]:
    """The segments of a pair: its first `shared` tokens, then the rest of each side."""
    return (
        Part(chosen.ids[:shared], chosen.weights[:shared]),
        Part(chosen.ids[shared:], chosen.weights[shared:], parent=0),
        Part(rejected.ids[shared:], rejected.weights[shared:], parent=0),
    )


def side_lengths(documents: Documents) -> SideLengths:
    """Lengths of both sides of every pair of a mixture, from what is mapped; no row is read."""
    known = [_side_lengths(store) for store in documents.stores]
    picked = [[each[pick] for each in one] for one, pick in zip(known, documents.picks, strict=True)]
    tokens, scored = (np.concatenate(each) for each in zip(*picked, strict=True))
    return SideLengths(tokens, scored)


def _side_lengths(store: Store) -> SideLengths:
    arrays = store.arrays
    rows = len(store)
    starts = arrays["row_ends"][:, 0] - store.lengths
    bounds = np.concatenate([np.zeros((rows, 1), np.int64), arrays["segment_ends"].reshape(rows, PAIR)], axis=1)
    # Scored tokens before any token: a straight line within a run of equal weight, so interpolation is exact.
    runs_of_row = np.diff(arrays["row_ends"][:, 1], prepend=0)
    run_ends = np.concatenate([[0], arrays["run_ends"] + np.repeat(starts, runs_of_row)])
    scored = np.concatenate([[0], np.cumsum(np.where(arrays["run_weights"] > 0, np.diff(run_ends), 0))])
    before = np.rint(np.interp(bounds + starts[:, None], run_ends, scored)).astype(np.int64)
    return SideLengths(*(_sides(np.diff(each, axis=1)) for each in (bounds, before)))


def _sides(segments_R3: Array) -> Array:
    return segments_R3[:, :1] + segments_R3[:, 1:]
