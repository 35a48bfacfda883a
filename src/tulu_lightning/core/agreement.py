"""How far two raters agree: pure functions on paired ratings."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

__all__ = ["Agreement", "agreement", "weighted_kappa"]


class Agreement(NamedTuple):
    """Of two raters on the same responses."""

    n: int
    """Responses that both rated."""
    same: float
    """Share with the same rating."""
    within_one: float
    """Share whose ratings are at most 1 apart."""
    kappa: float | None
    """Cohen's kappa with quadratic weights; None where neither rater ever varies."""
    comparisons: int
    """Pairs of responses to one prompt that both raters put in an order."""
    same_order: float | None
    """Share of those that they order alike: what decides whether both would make the same pairs."""


def agreement(
    first: Mapping[tuple[Hashable, Hashable], float], second: Mapping[tuple[Hashable, Hashable], float]
) -> Agreement | None:
    """Compare two raters; None where no response has both's rating.

    Args:
        first: rating by (prompt, response).
        second: likewise.
    """
    shared = [key for key in first if key in second]
    if not shared:
        return None
    a, b = [first[key] for key in shared], [second[key] for key in shared]
    by_prompt: dict[Hashable, list[tuple[Hashable, Hashable]]] = {}
    for key in shared:
        by_prompt.setdefault(key[0], []).append(key)
    orders = [
        ((first[x] > first[y]) - (first[x] < first[y]), (second[x] > second[y]) - (second[x] < second[y]))
        for keys in by_prompt.values()
        for x, y in combinations(keys, 2)
    ]
    strict = [(one, two) for one, two in orders if one and two]
    return Agreement(
        n=len(shared),
        same=sum(x == y for x, y in zip(a, b, strict=True)) / len(shared),
        within_one=sum(abs(x - y) <= 1 for x, y in zip(a, b, strict=True)) / len(shared),
        kappa=weighted_kappa(a, b),
        comparisons=len(strict),
        same_order=sum(one == two for one, two in strict) / len(strict) if strict else None,
    )


def weighted_kappa(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Cohen's kappa with quadratic weights (Cohen 1968): 1 - observed / expected squared distance.

    Expected is the mean over all pairings of a rating of the one with a rating of the other, as if they did not know
    of each other. 1 is full agreement, 0 what chance gives.

    Example: `weighted_kappa([1, 2, 3], [1, 2, 3])` is 1.0.
    """
    n = len(first)
    observed = sum((x - y) ** 2 for x, y in zip(first, second, strict=True)) / n
    # mean over all pairings of (x - y)^2 = E x^2 + E y^2 - 2 E x E y
    mean_x, mean_y = sum(first) / n, sum(second) / n
    expected = sum(x * x for x in first) / n + sum(y * y for y in second) / n - 2 * mean_x * mean_y
    return None if expected <= 0 else 1.0 - observed / expected
