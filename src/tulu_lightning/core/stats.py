"""Intervals for held-out scores: Wilson's for a share, the paired bootstrap for a difference."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch

__all__ = ["bootstrap", "mean_of", "paired_bootstrap", "wilson"]

_CELLS = 4_000_000
"""Resampled indices alive at once (32 MB)."""


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share of `successes` out of `n` (Wilson, 1927; no continuity correction).

    With p = successes / n and z the normal quantile: centre (p + z²/2n) / (1 + z²/n), half width
    z √(p(1-p)/n + z²/4n²) / (1 + z²/n). Unlike the textbook interval it stays in [0, 1] and has a width at p = 0 and 1.

    Returns:
        (low, high); (0, 1) when `n` is 0: nothing is known.

    Raises:
        ValueError: `successes` outside [0, n], or `confidence` outside (0, 1).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    z = NormalDist().inv_cdf(0.5 + _checked(confidence) / 2)
    if n == 0:
        return 0.0, 1.0
    p, scale = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # At p = 0 and p = 1 the ends are 0 and 1 exactly; rounding must not move them.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Percentile bootstrap of the mean of `after - before` over the same items (Efron & Tibshirani, 1993, chapter 13).

    Items are drawn with replacement as pairs, so what makes an item hard for both cancels.

    Args:
        before: one score per item.
        after: one score per item, in the same order.
        confidence: share of the resampled means between the two ends.
        resamples: how often all items are redrawn.
        seed: same seed, same interval.

    Returns:
        (mean difference, low, high).

    Raises:
        ValueError: lengths differ, are 0, or a score is not finite.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(f"{len(before)} scores before and {len(after)} after; need as many, and at least one")
    differences = [there - here for here, there in zip(before, after, strict=True)]
    return bootstrap(differences, confidence, resamples, seed)


def mean_of(estimates: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Mean of independent estimates, with its interval by the square-and-add rule (Zou & Donner, 2008, equation 4).

    With estimates t, each from l to u at one confidence, of k: low = mean - sqrt(sum((t - l)²)) / k, high likewise with u - t.
    Each keeps the side on which its own interval is wide.

    Args:
        estimates: (value, low, high), e.g. scores of tasks on items of their own.

    Returns:
        (mean, low, high), at the confidence of the estimates.

    Raises:
        ValueError: there is none.
    """
    if not estimates:
        raise ValueError("no estimates")
    k = len(estimates)
    mean = sum(value for value, _, _ in estimates) / k
    below, above = (math.sqrt(sum((each[side] - each[0]) ** 2 for each in estimates)) / k for side in (1, 2))
    return mean, mean - below, mean + above


def bootstrap(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Percentile bootstrap of a mean.

    Args:
        values: one per item; for two models on the same items, their differences.
        confidence: share of the resampled means between the two ends.
        resamples: how often all items are redrawn.
        seed: same seed, same interval.

    Returns:
        (mean, low, high).

    Raises:
        ValueError: no values, or one that is not finite.
    """
    values_R = torch.tensor(values, dtype=torch.float64)
    if not len(values_R) or not torch.isfinite(values_R).all():
        raise ValueError("a score is not finite" if len(values_R) else "there are no scores")
    tail = (1 - _checked(confidence)) / 2
    means = _resampled_means(values_R, resamples, torch.Generator().manual_seed(seed))
    ends = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return values_R.mean().item(), ends[0].item(), ends[1].item()


def _resampled_means(values_R: torch.Tensor, resamples: int, generator: torch.Generator) -> torch.Tensor:
    n = len(values_R)
    chunk = max(1, _CELLS // n)
    return torch.cat(
        [
            values_R[torch.randint(n, (min(chunk, resamples - at), n), generator=generator)].mean(-1)
            for at in range(0, resamples, chunk)
        ]
    )


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it lies between 0 and 1, e.g. 0.95")
    return confidence
