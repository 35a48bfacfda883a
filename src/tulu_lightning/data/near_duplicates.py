"""Texts that are nearly those before them: MinHash with banding (Broder 1997; Leskovec et al., chapter 3), then the exact share.

Two texts are near duplicates if their sets of n-grams of tokens have a Jaccard similarity of at least a threshold. Signatures only
find candidates; each is looked at exactly, so nothing is left out that is not a near duplicate.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from tulu_lightning.data.ngram_hash import hashed, ngram_hashes

__all__ = ["bands", "jaccard", "near_duplicates", "shingles", "signatures"]

Array = np.ndarray[Any, np.dtype[Any]]
HASHES = 128
"""Values of a signature."""
PRIME = (1 << 31) - 1
ROWS_AT_ONCE = 1 << 22
"""Numbers of a block of hashed shingles: bounds the memory, 32 MB."""


def shingles(texts: Sequence[str], n: int = 3) -> list[Array]:
    """The different n-grams of tokens of each text, as sorted hashes; a text of fewer tokens is one n-gram as a whole.

    Tokens are those of the decontamination: lower case, split at spaces and punctuation.
    """
    if not texts:
        return []
    tokens = hashed(texts)
    counts = np.bincount(tokens.texts_T, minlength=len(texts))
    found, places = ngram_hashes(tokens, n)
    owners = tokens.texts_T[places]
    grouped = np.split(found, np.cumsum(np.bincount(owners, minlength=len(texts)))[:-1])
    ends = np.cumsum(counts)
    result = []
    for index, own in enumerate(grouped):
        if counts[index] < n:
            piece = tokens.tokens_T[ends[index] - counts[index] : ends[index]]
            own = np.array([_hash_of(piece)], np.uint64) if len(piece) else np.zeros(0, np.uint64)
        result.append(np.unique(own))
    return result


def _hash_of(tokens: Array) -> int:
    """One number of a short run of tokens."""
    value = len(tokens)
    for token in tokens.tolist():
        value = (value * 0x9E3779B97F4A7C15 + token) & ((1 << 64) - 1)
    return value


def signatures(sets: Sequence[Array], hashes: int = HASHES, seed: int = 0) -> Array:
    """[texts, hashes] int64: the least value of each hash function over a set. The share of equal ones estimates Jaccard.

    The functions are (a x + b) mod (2^31 - 1) of the n-grams' hashes. An empty set has the value 2^31 - 1 everywhere.
    """
    draw = np.random.default_rng(seed)
    a_H, b_H = draw.integers(1, PRIME, hashes), draw.integers(0, PRIME, hashes)
    result = np.full((len(sets), hashes), PRIME, np.int64)
    for index, own in enumerate(sets):
        values = (own % np.uint64(PRIME)).astype(np.int64)
        for at in range(0, len(values), max(1, ROWS_AT_ONCE // hashes)):
            part = values[at : at + max(1, ROWS_AT_ONCE // hashes), None]
            np.minimum(result[index], ((part * a_H + b_H) % PRIME).min(0), out=result[index])
    return result


def bands(threshold: float, hashes: int = HASHES, miss: float = 0.02) -> int:
    """Rows of a band, so that a pair at the threshold shares no band with a probability of at most `miss`.

    A pair of similarity s shares a band of r rows of b = hashes / r with probability 1 - (1 - s^r)^b.
    """
    best = 1
    for rows in range(1, hashes + 1):
        if hashes % rows == 0 and (1 - threshold**rows) ** (hashes // rows) <= miss:
            best = rows
    return best


def jaccard(one: Array, other: Array) -> float:
    """|A and B| / |A or B| of two sorted sets; 1 for two empty ones."""
    if not len(one) and not len(other):
        return 1.0
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def near_duplicates(texts: Sequence[str], threshold: float, n: int = 3, seed: int = 0) -> dict[int, int]:
    """For each text that nearly repeats an earlier kept one: which one. The first of several stays.

    Args:
        texts: in the order of preference.
        threshold: Jaccard similarity of n-grams, above 0 to 1.
        n: tokens of an n-gram.
        seed: of the hash functions; it can only change which near duplicates close to the threshold are missed (2 %).
    """
    sets = shingles(texts, n)
    marks = signatures(sets, seed=seed)
    rows = bands(threshold)
    tables: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in range(HASHES // rows)]
    found: dict[int, int] = {}
    for index, own in enumerate(sets):
        keys = [marks[index, band * rows : (band + 1) * rows].tobytes() for band in range(len(tables))]
        near = sorted({other for table, key in zip(tables, keys, strict=True) for other in table.get(key, ())})
        same = next((other for other in near if jaccard(own, sets[other]) >= threshold), None)
        if same is not None:
            found[index] = same
            continue
        for table, key in zip(tables, keys, strict=True):
            table[key].append(index)
    return found
