"""Hashes of tokens and n-grams of many texts at once, by arithmetic on their bytes.

A token's hash is a polynomial in its bytes modulo 2^64: the difference of two prefix sums, times the inverse of the power at
which the token begins. Equal tokens have equal hashes, always; different ones all but always (`data.overlap` looks again
at what it finds). Nothing depends on the process or the machine, so hashes can be kept on disk.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from tulu_lightning.core.ngrams import SEPARATORS

__all__ = ["Hashed", "hashed", "ngram_hashes", "whole_hashes"]

Array = np.ndarray[Any, np.dtype[Any]]
U64 = np.uint64
BASE = 0x9E3779B97F4A7C15
"""Odd, so that it has an inverse modulo 2^64."""
STEP = 0xC2B2AE3D27D4EB4F
"""As `BASE`, for tokens within an n-gram."""


class Hashed(NamedTuple):
    """The tokens of some texts, one after the other."""

    tokens_T: Array
    """Hash of each; uint64."""
    texts_T: Array
    """Number of the text that it is in; int32, ascending."""


def hashed(texts: Sequence[str]) -> Hashed:
    """Hashes of all tokens of the texts."""
    encoded = [text.lower().encode("utf-8", "surrogatepass") for text in texts]
    data = np.frombuffer(b"\n".join([*encoded, b""]), np.uint8)
    inside = np.zeros(len(data) + 1, bool)
    inside[1:] = _word()[data]  # the last byte is a separator
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[::2], edges[1::2]
    powers, inverses = _powers(1 << max(12, len(data).bit_length()))
    sums = np.zeros(len(data) + 1, U64)
    np.cumsum((data.astype(U64) + U64(1)) * powers[: len(data)], out=sums[1:])
    found = (sums[ends] - sums[starts]) * inverses[starts]
    bounds = np.cumsum([len(text) + 1 for text in encoded])
    counts = np.diff(np.searchsorted(starts, bounds), prepend=0)
    return Hashed(_mixed(found), np.repeat(np.arange(len(texts), dtype=np.int32), counts))


def ngram_hashes(texts: Hashed, n: int) -> tuple[Array, Array]:
    """Hashes of all n-grams, and the place of the first token of each; none crosses from one text into the next."""
    last = len(texts.tokens_T) - n + 1
    if last <= 0:
        return np.zeros(0, U64), np.zeros(0, np.int64)
    places = np.flatnonzero(texts.texts_T[:last] == texts.texts_T[n - 1 :])
    found = np.zeros(last, U64)
    for ahead in range(n):
        found *= U64(STEP)
        found += texts.tokens_T[ahead : ahead + last]
    return _mixed(found)[places], places


def whole_hashes(texts: Hashed) -> tuple[Array, Array]:
    """A hash of all tokens of each text that has any, and the number of that text."""
    if not len(texts.tokens_T):
        return np.zeros(0, U64), np.zeros(0, np.int64)
    begins = np.flatnonzero(np.diff(texts.texts_T, prepend=-1))
    lengths = np.diff(begins, append=len(texts.texts_T))
    within = np.arange(len(texts.texts_T)) - np.repeat(begins, lengths)
    powers = _powers(1 << max(12, int(lengths.max()).bit_length()))[0]
    sums = np.add.reduceat(texts.tokens_T * powers[within], begins)
    return _mixed(sums + lengths.astype(U64)), texts.texts_T[begins].astype(np.int64)


def _mixed(values: Array) -> Array:
    """The same numbers, well spread over all their bits; one to one. In place."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values ^= values >> U64(shift)
        values *= U64(factor)
    values ^= values >> U64(31)
    return values


@cache
def _word() -> Array:
    """For each byte, whether it belongs to a token."""
    table = np.ones(256, bool)
    table[[ord(character) for character in SEPARATORS]] = False
    return table


@cache
def _powers(count: int) -> tuple[Array, Array]:
    """The first powers of the base and of its inverse."""
    inverse = pow(BASE, -1, 1 << 64)
    both = []
    for base in (BASE, inverse):
        factors = np.full(count, base, U64)
        factors[0] = 1
        both.append(np.multiply.accumulate(factors))
    return both[0], both[1]
