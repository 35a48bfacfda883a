"""The paired bootstrap of a promotion, and how looks share a level; each held against arithmetic or a simulation."""

import bisect
import math

import numpy as np
import pytest

from tulu_lightning.core.gain import Look, Paired, gain, share_of_level
from tulu_lightning.core.promotion import PromotionRule


def outcomes(up, down, n):
    """Scores of n items of which so many are gained, so many lost, and the rest right both times."""
    before = [0.0] * up + [1.0] * down + [1.0] * (n - up - down)
    after = [1.0] * up + [0.0] * down + [1.0] * (n - up - down)
    return Paired(before, after)


# The interval ------------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_distribution_it_stands_for():
    # Gained and lost items, redrawn, are nearly Poisson (10 and 4 of 1000), plus one of each: X - Y with means 11 and 5.
    rng = np.random.default_rng(0)
    draws = (
        (rng.multinomial(1000, [0.01, 0.004, 0.986], 400_000)[:, :2] + rng.poisson(1, (400_000, 2))) @ [1, -1] / 1000
    )
    low, high = np.quantile(draws, [0.025, 0.975])
    found = gain(outcomes(10, 4, 1000), 0.95)
    assert found.difference == pytest.approx(0.006)
    assert found.low == pytest.approx(low, abs=0.0011)
    assert found.high == pytest.approx(high, abs=0.0011)


def test_redrawing_counts_is_redrawing_items():
    # 16 different values are redrawn by their counts, 17 item by item; the 17th value here is as good as one of the 16.
    rng = np.random.default_rng(1)
    after = rng.integers(0, 16, 400) / 15
    other = after.copy()
    other[np.flatnonzero(after == after[0])[0]] += 1e-9
    assert len(set(after)) == 16
    assert len(set(other)) == 17
    one, two = (gain(Paired([0.5] * 400, list(each)), 0.95) for each in (after, other))
    error = after.std() / math.sqrt(400)
    for here, there in zip(one, two, strict=True):
        assert here == pytest.approx(there, abs=0.05 * error)
    assert one.high - one.low == pytest.approx(2 * 1.96 * error, rel=0.03)


def test_groups_count_the_same_whatever_their_size():
    # 10 items all gained and 90 unchanged: means 1 and 0, so 0.5; of single items 0.1.
    pairs = Paired([0.0] * 100, [1.0] * 10 + [0.0] * 90, ["a"] * 10 + ["b"] * 90)
    assert gain(pairs, 0.95).difference == pytest.approx(0.5)
    assert gain(pairs._replace(groups=None), 0.95).difference == pytest.approx(0.1)
    # Within their groups nothing varies: what is left is the chance item, ±Poisson of 1 over 100.
    assert gain(pairs, 0.95).low == pytest.approx(0.47, abs=0.011)


CHANCE = 2
"""Variance of the items that are gained and lost by chance in a resample, before it is divided by n squared."""


def width(spread):
    """Of a 95% interval."""
    return 2 * 1.96 * spread


def test_groups_of_two_vary_as_two_draws_do():
    # 57 groups, in each one item gained and one not: s² = 1/2 a group, so the mean of means has variance 57 (1/2 / 2) / 57².
    # Redrawn as they are, two items have half of that.
    pairs = Paired([0.0] * 114, [1.0, 0.0] * 57, [str(i // 2) for i in range(114)])
    found = gain(pairs, 0.95)
    assert found.difference == pytest.approx(0.5)
    assert found.high - found.low == pytest.approx(width(math.sqrt(0.25 / 57 + CHANCE / 114**2)), rel=0.03)


def test_groups_of_one_vary_as_much_as_they_differ():
    # 57 groups of one, 25 of them gained: as 57 items of one group, p (1 - p) / 56.
    pairs = Paired([0.0] * 57, [1.0] * 25 + [0.0] * 32, [str(i) for i in range(57)])
    found = gain(pairs, 0.95)
    assert found.difference == pytest.approx(25 / 57)
    spread = math.sqrt(25 / 57 * 32 / 57 / 56 + CHANCE / 57**2)
    assert found.high - found.low == pytest.approx(width(spread), rel=0.03)


def test_a_lone_group_of_one_varies_as_the_smallest_other_does():
    # Means 1 (of one item), 1/2 (of two) and 0 (of four): their mean 1/2. The one item stands for {1, 1, 0}: variance 1/3.
    # The two have s² = 1/2, so 1/4; the four do not vary. All over 3².
    pairs = Paired([0.0] * 7, [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], ["a", "b", "b", "c", "c", "c", "c"])
    found = gain(pairs, 0.95)
    assert found.difference == pytest.approx(0.5)
    assert found.high - found.low == pytest.approx(width(math.sqrt((1 / 3 + 1 / 4) / 9 + CHANCE / 49)), rel=0.1)


def test_one_item_alone_says_little():
    found = gain(Paired([0.0], [1.0], ["a"]), 0.95)
    assert found.low <= 0 < found.high


def test_the_same_scores_give_the_same_interval():
    pairs = outcomes(30, 20, 300)
    assert gain(pairs, 0.99) == gain(pairs, 0.99)
    assert gain(pairs, 0.99).low < gain(pairs, 0.9).low


@pytest.mark.parametrize("pairs", [Paired([], []), Paired([1.0], []), Paired([math.nan], [1.0])])
def test_scores_that_do_not_pair_are_refused(pairs):
    with pytest.raises(ValueError, match="score"):
        gain(pairs, 0.95)


def promotes(up, down, confidence):
    return gain(outcomes(up, down, 1000), confidence).low > 0


MEANS = [1.0, 2.5, 4.0, 8.0, 20.0]
SLOW = [
    pytest.param(m, c, marks=pytest.mark.slow) for m in MEANS for c in (0.95, 0.99, 0.9975) if (m, c) != (2.5, 0.95)
]


@pytest.mark.parametrize(("expected", "confidence"), [(2.5, 0.95), *SLOW])
def test_few_items_that_differ_do_not_pass_for_a_gain(expected, confidence):
    # Without a true gain, gained and lost items are each Poisson of the same mean. The rule depends on their two counts
    # alone, so its rate is a sum over the table. At most (1 - confidence) / 2 may pass; the plain bootstrap lets through
    # more at a mean of 2.5, where all it asks at 95% is four gained and none lost.
    most = int(expected + 6 * math.sqrt(expected) + 6)
    chance = [math.exp(-expected) * expected**k / math.factorial(k) for k in range(most)]
    rate = 0.0
    for down in range(most):
        least = bisect.bisect_left(
            range(most), True, down + 1, key=lambda up, down=down: promotes(up, down, confidence)
        )
        rate += chance[down] * (1 - sum(chance[:least]))  # whoever gained more passes, too
    assert rate <= (1 - confidence) / 2


# Looks -------------------------------------------------------------------------------------------------------------


def test_even_shares():
    assert [share_of_level(0.05, Look(k, 4), "even") for k in range(1, 5)] == pytest.approx([0.0125] * 4)


def test_late_shares_are_those_of_the_spending_function():
    # f(t) = 2 - 2 Φ(1.95996 / √t): f(1/4) = 2 - 2 Φ(3.91993) = 0.0000886, f(1/2) = 2 - 2 Φ(2.77181) = 0.005575,
    # f(3/4) = 2 - 2 Φ(2.26317) = 0.023625, f(1) = 0.05.
    expected = [0.0000886, 0.0054864, 0.0180500, 0.026375]
    shares = [share_of_level(0.05, Look(k, 4), "late") for k in range(1, 5)]
    assert shares == pytest.approx(expected, rel=2e-3)
    assert sum(shares) == pytest.approx(0.05)


@pytest.mark.parametrize("spending", ["even", "late"])
@pytest.mark.parametrize("planned", [1, 2, 7, 100])
def test_shares_sum_to_the_level(spending, planned):
    shares = [share_of_level(0.1, Look(k, planned), spending) for k in range(1, planned + 1)]
    assert sum(shares) == pytest.approx(0.1)
    assert min(shares) >= 0


def test_no_more_is_spent_than_there_is():
    assert share_of_level(0.05, Look(6, 5), "even") == 0.0  # beyond the plan
    assert share_of_level(0.05, Look(2, 4, spent=0.045), "even") == pytest.approx(0.005)
    assert share_of_level(0.05, Look(2, 4, spent=0.06), "even") == 0.0


# The rate of a whole run -------------------------------------------------------------------------------------------


def run_without_gain(rng, looks, n=300, kept=0.7):
    """Scores of a start and of later checkpoints that are neither better nor worse.

    Items differ in how hard they are, so both scores of a pair go together; and a checkpoint differs from the one before
    it in only some of the answers, so the looks go together. Each checkpoint's chance on each item stays what it was.
    """
    hard = rng.beta(1, 1, n)
    start = rng.random(n) < hard
    draw = rng.random(n)
    later = []
    for _ in range(looks):
        draw = np.where(rng.random(n) < kept, draw, rng.random(n))
        later.append(draw < hard)
    return start.astype(float).tolist(), [scores.astype(float).tolist() for scores in later]


def false_promotions(rule, looks, runs, seed, share=True):
    rng = np.random.default_rng(seed)
    count = 0
    for _ in range(runs):
        start, later = run_without_gain(rng, looks)
        spent = 0.0
        for number, scores in enumerate(later, 1):
            look = Look(number, looks, spent) if share else Look()
            decision = rule.judge({"held-out": Paired(start, scores)}, look)
            spent += decision.level
            if decision.promote:
                count += 1
                break
    return count


@pytest.mark.parametrize("spending", ["even", "late"])
def test_many_looks_without_a_gain_promote_no_oftener_than_the_level_says(spending):
    # At most 2.5% of 80 runs, 2; a binomial count of that mean exceeds 7 with a chance of 0.1%.
    rule = PromotionRule(spending=spending, min_items=100)
    assert false_promotions(rule, looks=6, runs=80, seed=2) <= 7


def promoted_by_chance(sizes, runs, seed):
    """How often two checkpoints of one skill differ "beyond chance" in the mean of groups' means, at a level of 10%."""
    rng = np.random.default_rng(seed)
    groups = [str(number) for number, size in enumerate(sizes) for _ in range(size)]
    rule = PromotionRule(confidence=0.8, min_items=1)
    count = 0
    for _ in range(runs):
        hard = rng.beta(1, 1, len(groups))
        before, after = ((rng.random(len(groups)) < hard).astype(float).tolist() for _ in range(2))
        count += rule.judge({"held-out": Paired(before, after, groups)}, Look()).promote
    return count


def test_few_items_a_group_promote_no_oftener_than_the_level_says():
    # A binomial count of 60 runs at 10% exceeds 13 with a chance of 0.4%; redrawn as they were, these groups gave 14 (now 6).
    assert promoted_by_chance([1] * 30 + [2] * 20, runs=60, seed=1) <= 13


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[1] * 57, [2] * 57, [1] * 17 + [2] * 20 + [3] * 10 + [8] * 6])
def test_the_rate_with_few_items_a_group_over_many_runs(sizes):
    # Three standard errors above 10%, of 300 runs.
    assert promoted_by_chance(sizes, runs=300, seed=2) <= 30 + 3 * math.sqrt(300 * 0.1 * 0.9)


@pytest.mark.slow
def test_without_sharing_many_looks_promote_by_chance():
    # What the shares are for: eight looks at the full level each let through more than the level; with them, not.
    runs, rate = 300, 0.025
    allowed = runs * rate + 3 * math.sqrt(runs * rate * (1 - rate))
    assert false_promotions(PromotionRule(), looks=8, runs=runs, seed=2, share=False) > allowed
    assert false_promotions(PromotionRule(), looks=8, runs=runs, seed=2) <= allowed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("looks", "confidence", "spending"), [(1, 0.95, "even"), (12, 0.95, "even"), (12, 0.8, "late")]
)
def test_the_rate_over_many_runs(looks, confidence, spending):
    # Three standard errors above (1 - confidence) / 2, of 300 runs.
    runs, rate = 300, (1 - confidence) / 2
    allowed = runs * rate + 3 * math.sqrt(runs * rate * (1 - rate))
    rule = PromotionRule(confidence=confidence, spending=spending)
    assert false_promotions(rule, looks, runs, seed=looks) <= allowed


def test_a_true_gain_is_found_among_as_many_looks():
    # 300 items, 8 looks: 60 items gained and 15 lost is 0.15 with a standard error of 0.028, far beyond any share.
    rule = PromotionRule()
    assert all(rule.judge({"held-out": outcomes(60, 15, 300)}, Look(k, 8)).promote for k in range(1, 9))
