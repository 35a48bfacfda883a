"""Pairs out of ratings, and how far raters agree, worked out by hand."""

import random
from itertools import product

import pytest

from tulu_lightning.core.agreement import agreement, weighted_kappa
from tulu_lightning.core.binarise import NoPair, mean_rating, pick


@pytest.mark.parametrize(
    ("ratings", "mean"),
    [([4, 5, "N/A", 3], 4.0), ([4, None, 5, 5], None), (["N/A"], None), ([], None), ([1, 2], 1.5)],
)
def test_the_mean_is_over_what_applies_and_an_unreadable_rating_takes_the_response_out(ratings, mean):
    assert mean_rating(ratings) == mean


def outcomes(means, **options):
    return {pick(means, random.Random(seed), **options) for seed in range(200)}


def test_the_highest_is_chosen_and_any_lower_one_is_rejected():
    assert outcomes([2.0, 4.5, 3.0, 4.5]) == {(1, 0), (1, 2), (3, 0), (3, 2)}  # 1 and 3 tie: never a pair


def test_unrated_responses_are_no_side_of_a_pair():
    assert outcomes([None, 4.0, 3.0]) == {(1, 2)}
    assert outcomes([None, 4.0]) == {NoPair("too few rated responses")}
    assert outcomes([4.0, 4.0, 4.0]) == {NoPair("all responses are alike")}
    assert outcomes([]) == {NoPair("too few rated responses")}


def test_literally_any_other_response_is_rejected():
    assert outcomes([4.0, 4.0, None], literal=True) == {(0, 1), (0, 2), (1, 0), (1, 2)}


def test_a_chosen_response_may_have_to_be_good():
    assert outcomes([0.0, 0.5], least_chosen=1.0) == {NoPair("no response is good enough")}
    assert outcomes([0.0, 1.0], least_chosen=1.0) == {(1, 0)}


def test_restricted_pairs_take_the_best_response_that_has_a_partner():
    """0 is the policy's; a pair has it on one side. 1 is the best, and 0 is lower."""
    with_policy = [(0, 1), (0, 2), (0, 3)]
    assert outcomes([3.0, 5.0, 1.0, 3.0], allowed=with_policy) == {(1, 0)}
    assert outcomes([4.0, 4.0, 1.0], allowed=with_policy[:2]) == {(0, 2)}
    assert outcomes([2.0, 2.0, 1.0], allowed=[(0, 1)]) == {NoPair("no allowed pair differs")}


def test_a_pair_always_has_the_better_side_chosen():
    for means in product([None, 1.0, 2.0, 3.0], repeat=4):
        found = pick(list(means), random.Random(0))
        rated = [mean for mean in means if mean is not None]
        if isinstance(found, NoPair):
            assert len(set(rated)) < 2
        else:
            assert means[found[0]] == max(rated) > means[found[1]]


def test_kappa_by_hand():
    # Observed mean square distance: (0 + 1 + 0 + 1) / 4 = 0.5. All 16 pairings of 1,2,3,4 with 1,3,3,3: by moments
    # E x^2 = 7.5, E y^2 = 7, E x = E y = 2.5, so 7.5 + 7 - 12.5 = 2.0; kappa = 1 - 0.5 / 2.
    assert weighted_kappa([1, 2, 3, 4], [1, 3, 3, 3]) == pytest.approx(0.75)
    pairings = [(x - y) ** 2 for x in (1, 2, 3, 4) for y in (1, 3, 3, 3)]
    assert sum(pairings) / 16 == 2.0
    assert weighted_kappa([3, 3], [3, 3]) is None
    assert weighted_kappa([1, 5], [5, 1]) == pytest.approx(-1.0)  # observed 16, expected 8


def test_agreement_counts_what_both_rated_and_orders_within_a_prompt():
    first = {("p", "a"): 5, ("p", "b"): 3, ("p", "c"): 3, ("q", "a"): 1, ("q", "b"): 2, ("r", "a"): 4}
    second = {("p", "a"): 4, ("p", "b"): 3, ("p", "c"): 2, ("q", "a"): 3, ("q", "b"): 1}
    found = agreement(first, second)
    assert found is not None
    assert found.n == 5
    assert found.same == pytest.approx(1 / 5)
    assert found.within_one == pytest.approx(4 / 5)  # q,a is 2 apart
    # p: (a,b) and (a,c) both order alike, (b,c) is a tie for the first; q: (a,b) in opposite order.
    assert (found.comparisons, found.same_order) == (3, pytest.approx(2 / 3))
    assert agreement({("p", "a"): 1}, {("q", "a"): 1}) is None
