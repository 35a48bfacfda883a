"""How sure it is that a checkpoint is better: a paired bootstrap of one comparison, and a level shared by several looks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["FINEST", "Gain", "Look", "Paired", "Spending", "gain", "share_of_level"]

Spending = Literal["even", "late"]
FINEST = 2e-4
"""Smallest level of a look that is tested: below it the bootstrap has no draws to count."""
CELLS = 4_000_000
DISTINCT = 16
"""Up to so many different values are redrawn by their counts, which costs no memory for each item."""


class Paired(NamedTuple):
    """Scores, each in [0, 1], of two checkpoints on the same items in the same order."""

    before: Sequence[float]
    after: Sequence[float]
    groups: Sequence[str] | None = None
    """The group of each item where the score is the mean of groups' means."""


class Gain(NamedTuple):
    """Mean of after - before, and its interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Look:
    """One of several moments at which a run may be promoted."""

    number: int = 1
    planned: int = 1
    spent: float = 0.0
    """What the earlier looks have used of the level."""


def share_of_level(level: float, look: Look, spending: Spending) -> float:
    """The part of a run's level that one look may use; the parts of all planned looks sum to the level.

    By Bonferroni's inequality the chance that any look errs is then at most the level, however the looks depend on each
    other. That they do: all of them score the same items. So the boundaries of sequential trials, which rely on data that
    accumulate, would not hold here; of theirs only the way to divide the level is taken.

    Args:
        level: of the whole run.
        look: which one. One beyond the planned number gets nothing.
        spending: `even` gives every look the same. `late` gives most to the last ones, as O'Brien and Fleming's
            boundaries do: look k of K gets f(k/K) - f((k-1)/K) with f(t) = 2 - 2 Φ(z / √t), Φ(z) = 1 - level / 2
            (Lan & DeMets 1983).
    """
    if look.number > look.planned:
        return 0.0
    if spending == "even":
        share = level / look.planned
    else:
        share = _late(level, look.number / look.planned) - _late(level, (look.number - 1) / look.planned)
    return max(0.0, min(share, level - look.spent))


def _late(level: float, t: float) -> float:
    if t <= 0:
        return 0.0
    normal = NormalDist()
    return 2 - 2 * normal.cdf(normal.inv_cdf(1 - level / 2) / math.sqrt(t))


def gain(pairs: Paired, confidence: float, seed: int = 0) -> Gain:
    """Percentile bootstrap of the mean of after - before, items redrawn as pairs (Efron & Tibshirani 1993, chapter 13).

    Where few items differ the plain bootstrap is too sure of itself: three gained and none lost never resample to a
    loss. So each resample also has a chance number of items (Poisson, mean 1) gained, and as many lost, as if one of each
    sort had been seen besides; Agresti & Min (2005) add half an item to each cell of the table for the same reason.

    Args:
        pairs: at least one item. With groups every group counts the same, and items are redrawn within their group; how far
            a redrawn mean of m items strays is widened by √(m / (m - 1)), by which the plain bootstrap falls short of the
            variance. With MMLU's 57 groups of two that is 1.4.
        confidence: share of the resampled means between the two ends.
        seed: same seed, same interval.

    Raises:
        ValueError: lengths differ, are 0, or a score is not finite.
    """
    if len(pairs.before) != len(pairs.after) or not len(pairs.before):
        n, m = len(pairs.before), len(pairs.after)
        raise ValueError(f"{n} scores before and {m} after; need as many, and at least one")
    values_R = torch.tensor(pairs.after, dtype=torch.float64) - torch.tensor(pairs.before, dtype=torch.float64)
    if not torch.isfinite(values_R).all():
        raise ValueError("a score is not finite")
    tail = (1 - confidence) / 2
    resamples = max(10_000, math.ceil(50 / tail))
    generator = torch.Generator().manual_seed(seed)
    strata = [_Stratum(values_R, values_R, 1.0)] if pairs.groups is None else _strata(values_R, pairs.groups)
    mean = sum(each.weight * each.own_R.mean().item() for each in strata)
    means = torch.zeros(resamples, dtype=torch.float64)
    for each in strata:
        drawn = _resampled_means(each.pool_R, len(each.own_R), resamples, generator)
        if pairs.groups is None:
            means += drawn
        elif (pool := len(each.pool_R)) > 1:
            means += each.weight * math.sqrt(pool / (pool - 1)) * (drawn - each.pool_R.mean())
    means += 0.0 if pairs.groups is None else mean
    one = torch.ones(resamples, dtype=torch.float64)
    more = torch.poisson(one, generator=generator) - torch.poisson(one, generator=generator)
    means += more / len(values_R)
    ends = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return Gain(mean, ends[0].item(), ends[1].item())


class _Stratum(NamedTuple):
    own_R: Tensor
    """The items that count."""
    pool_R: Tensor
    """The items that stand for how they vary."""
    weight: float
    """Of their mean."""


def _strata(values_R: Tensor, groups: Sequence[str]) -> list[_Stratum]:
    """Groups as strata. Those of one item are collapsed into one stratum, whose spread is then also that between them, so
    never too small by expectation (Cochran 1977, section 5A.12); a lone one with the smallest other group.
    """
    places: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        places.setdefault(group, []).append(place)
    several = sorted((each for each in places.values() if len(each) > 1), key=len)
    single = [each[0] for each in places.values() if len(each) == 1]
    share = 1 / len(places)
    found = [_Stratum(values_R[each], values_R[each], share) for each in several]
    if single:
        pool = [*single, *several[0]] if len(single) == 1 and several else single
        found.append(_Stratum(values_R[single], values_R[pool], share * len(single)))
    return found


def _resampled_means(values_R: Tensor, draws: int, resamples: int, generator: torch.Generator) -> Tensor:
    n = len(values_R)
    distinct, counts = values_R.unique(return_counts=True)
    if len(distinct) > DISTINCT:
        chunk = max(1, CELLS // draws)
        sizes = [min(chunk, resamples - at) for at in range(0, resamples, chunk)]
        return torch.cat([values_R[torch.randint(n, (size, draws), generator=generator)].mean(-1) for size in sizes])
    # How often each value is drawn is multinomial: one binomial after the other, of what is left.
    left, rest, sums = torch.full((resamples,), float(draws), dtype=torch.float64), n, torch.zeros(resamples).double()
    for value, count in zip(distinct.tolist(), counts.tolist(), strict=True):
        drawn = left if count == rest else torch.binomial(left, torch.full_like(left, count / rest), generator)
        sums, left, rest = sums + value * drawn, left - drawn, rest - count
    return sums / draws
