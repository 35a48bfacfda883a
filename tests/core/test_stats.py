import math
import random

import pytest
import torch

from tulu_lightning.core.stats import mean_of, paired_bootstrap, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_by_pencil():
    # 2 of 4 with z = 1 (confidence 0.6827): centre (1/2 + 1/8) / (5/4) = 1/2,
    # half width sqrt(1/16 + 1/64) / (5/4) = (sqrt(5)/8) (4/5) = sqrt(5)/10.
    one_sigma = math.erf(1 / math.sqrt(2))
    half = math.sqrt(5) / 10
    assert wilson(2, 4, one_sigma) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-9)


def test_wilson_has_exact_ends_and_is_symmetric():
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(3, 10)
    assert wilson(7, 10) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize("arguments", [(5, 4), (-1, 4), (1, 4, 1.0), (1, 4, 0.0)])
def test_wilson_refuses_what_is_no_share(arguments):
    with pytest.raises(ValueError, match=r"successes|confidence"):
        wilson(*arguments)


def test_the_bootstrap_agrees_with_the_normal_approximation():
    # 150 items fall, 250 stay, 400 rise: mean 250/800, variance (550 - 250²/800) / 800 per item.
    before, after = [1.0] * 150 + [0.0] * 250 + [0.0] * 400, [0.0] * 150 + [0.0] * 250 + [1.0] * 400
    mean, sd = 250 / 800, math.sqrt((550 / 800 - (250 / 800) ** 2) / 800)
    difference, low, high = paired_bootstrap(before, after)
    assert difference == pytest.approx(mean, abs=1e-12)
    assert low == pytest.approx(mean - 1.96 * sd, abs=0.05 * sd + 1 / 800)
    assert high == pytest.approx(mean + 1.96 * sd, abs=0.05 * sd + 1 / 800)


def test_pairing_cancels_what_both_share():
    # Scores spread widely, differences are all 0.25: the interval has no width.
    before = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    difference, low, high = paired_bootstrap(before, [b + 0.25 for b in before])
    assert (difference, low, high) == pytest.approx((0.25, 0.25, 0.25), abs=1e-12)


def test_the_bootstrap_is_reproducible_and_reads_its_seed_and_confidence():
    before, after = [0.0, 1.0] * 50, [1.0, 1.0, 0.0, 1.0] * 25
    first = paired_bootstrap(before, after, seed=3)
    assert first == paired_bootstrap(before, after, seed=3)
    many = [paired_bootstrap(before, after, resamples=37, seed=s) for s in range(5)]
    assert len(set(many)) > 1
    narrow = paired_bootstrap(before, after, confidence=0.5, seed=3)
    assert narrow[2] - narrow[1] < first[2] - first[1]


@pytest.mark.parametrize(
    ("before", "after"), [([], []), ([1.0], [1.0, 0.0]), ([0.0, float("nan")], [1.0, 1.0]), ([0.0], [float("inf")])]
)
def test_the_bootstrap_refuses_unpaired_or_broken_scores(before, after):
    with pytest.raises(ValueError, match=r"scores|finite"):
        paired_bootstrap(before, after)


def test_the_interval_of_a_mean_is_put_together_from_its_parts():
    # Two of 0.3, one a tenth wide below and the other three tenths: sqrt(0.01 + 0.09) / 2.
    mean, low, high = mean_of([(0.3, 0.2, 0.4), (0.5, 0.2, 0.9)])
    assert mean == pytest.approx(0.4)
    assert low == pytest.approx(0.4 - math.sqrt(0.1**2 + 0.3**2) / 2)
    assert high == pytest.approx(0.4 + math.sqrt(0.1**2 + 0.4**2) / 2)
    assert mean_of([(0.3, 0.1, 0.4)]) == pytest.approx((0.3, 0.1, 0.4))
    with pytest.raises(ValueError, match="no estimates"):
        mean_of([])


def test_the_interval_of_a_mean_holds_it_as_often_as_it_says():
    draw, hits = random.Random(0), 0
    for _ in range(400):
        parts = []
        for share, n in ((0.9, 60), (0.4, 200), (0.6, 40)):
            right = sum(draw.random() < share for _ in range(n))
            parts.append((right / n, *wilson(right, n)))
        _, low, high = mean_of(parts)
        hits += low <= (0.9 + 0.4 + 0.6) / 3 <= high
    assert 0.92 <= hits / 400 <= 0.98
