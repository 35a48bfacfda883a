"""Held-out scores by response length: do longer answers score better, and did a stage make answers longer?"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tulu_lightning.core.stats import paired_bootstrap, wilson

__all__ = ["Answer", "Bucket", "BucketScore", "by_length", "length_buckets", "length_change"]


class Answer(NamedTuple):
    """What one held-out answer came to."""

    tokens: int
    """Its length, the end token included."""
    score: float
    """In [0, 1]."""
    cut: bool = False
    """It ran into the limit of new tokens."""


class Bucket(NamedTuple):
    """Response lengths from `shortest` to `longest`, both ends included; in tokens."""

    shortest: int
    longest: int

    def __str__(self) -> str:
        """`7`, or `8–12`."""
        return str(self.shortest) if self.shortest == self.longest else f"{self.shortest}–{self.longest}"


class BucketScore(NamedTuple):
    """The answers of one bucket and their mean score with its interval, all three in [0, 1]."""

    bucket: Bucket
    n: int
    score: float | None
    """None where the bucket is empty."""
    low: float
    high: float


def length_buckets(lengths: Iterable[int], most: int = 6) -> list[Bucket]:
    """Cut lengths into at most `most` buckets that hold about as many answers each, from short to long.

    Equal lengths stay together: up to `most` different lengths have a bucket each, and a length that very many answers
    share has one to itself. A bucket ends at lengths that occur.

    Args:
        lengths: in tokens, in any order; those of all the answers that are to be compared.
        most: number of buckets, at least 1.
    """
    counts = sorted(Counter(lengths).items())
    buckets: list[Bucket] = []
    at, left = 0, sum(count for _, count in counts)
    while at < len(counts):
        room = most - len(buckets)
        end, held = at + 1, counts[at][1]
        # Lengths that are still more than the buckets share one, until it holds about its part of the answers left.
        while len(counts) - end >= room and (room == 1 or held + counts[end][1] / 2 < left / room):
            held += counts[end][1]
            end += 1
        buckets.append(Bucket(counts[at][0], counts[end - 1][0]))
        at, left = end, left - held
    return buckets


def by_length(answers: Iterable[Answer], buckets: Sequence[Bucket], confidence: float = 0.95) -> list[BucketScore]:
    """Mean score of the answers of each bucket, with Wilson's interval.

    Raises:
        ValueError: an answer's length is in no bucket.
    """
    scores: list[list[float]] = [[] for _ in buckets]
    for answer in answers:
        place = next((i for i, b in enumerate(buckets) if b.shortest <= answer.tokens <= b.longest), None)
        if place is None:
            raise ValueError(f"{answer.tokens} tokens are in none of the buckets {', '.join(map(str, buckets))}")
        scores[place].append(answer.score)
    return [
        BucketScore(bucket, len(own), sum(own) / len(own) if own else None, *wilson(sum(own), len(own), confidence))
        for bucket, own in zip(buckets, scores, strict=True)
    ]


def length_change(
    before: Sequence[Answer], after: Sequence[Answer], confidence: float = 0.95
) -> tuple[float, float, float]:
    """How many tokens longer the answers to the same prompts are after than before, with its paired bootstrap interval.

    Returns:
        (mean difference, low, high), in tokens.

    Raises:
        ValueError: there are more answers before than after, or fewer, or none.
    """
    return paired_bootstrap([a.tokens for a in before], [a.tokens for a in after], confidence)
