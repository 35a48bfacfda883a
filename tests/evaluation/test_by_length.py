"""Buckets of response lengths, and what the answers in them score."""

import itertools
import random

import pytest

from tulu_lightning.core.stats import wilson
from tulu_lightning.evaluation.by_length import Answer, Bucket, by_length, length_buckets, length_change


def test_a_few_different_lengths_have_a_bucket_each():
    assert length_buckets([7, 3, 3, 5, 7, 3], most=3) == [(3, 3), (5, 5), (7, 7)]


def test_many_lengths_are_cut_into_parts_of_about_as_many_answers():
    # 1 to 12, once each, in four buckets: three a bucket.
    assert length_buckets(range(1, 13), most=4) == [(1, 3), (4, 6), (7, 9), (10, 12)]


def test_a_length_that_most_answers_have_stands_alone():
    # Of 108 answers in three buckets each should hold 36: the 100 of length 3 are more than that. The eight that are
    # left make four a bucket.
    assert length_buckets([3] * 100 + list(range(10, 18)), most=3) == [(3, 3), (10, 13), (14, 17)]


def test_a_bucket_ends_at_lengths_that_occur():
    assert length_buckets([1, 2, 50, 90], most=2) == [(1, 2), (50, 90)]


def test_no_answers_make_no_buckets():
    assert length_buckets([]) == []


@pytest.mark.parametrize("seed", range(50))
def test_buckets_are_few_and_apart_and_hold_every_length_once(seed):
    draw = random.Random(seed)
    most = draw.randint(1, 7)
    lengths = [draw.choice([draw.randint(0, 4), draw.randint(0, 300)]) for _ in range(draw.randint(1, 200))]
    buckets = length_buckets(lengths, most)
    assert len(buckets) == min(most, len(set(lengths)))
    assert all(a.longest < b.shortest for a, b in itertools.pairwise(buckets))
    assert all(sum(b.shortest <= length <= b.longest for b in buckets) == 1 for length in lengths)
    assert {end for bucket in buckets for end in bucket} <= set(lengths)


def test_each_bucket_has_the_mean_score_of_its_answers_and_wilsons_interval():
    answers = [Answer(3, 1.0), Answer(4, 0.5), Answer(9, 0.0), Answer(4, 1.0)]
    short, empty, long = by_length(answers, [Bucket(1, 4), Bucket(5, 8), Bucket(9, 9)])
    assert short == (Bucket(1, 4), 3, 2.5 / 3, *wilson(2.5, 3))
    assert empty == (Bucket(5, 8), 0, None, 0.0, 1.0), "of an empty bucket nothing is known"
    assert long == (Bucket(9, 9), 1, 0.0, *wilson(0, 1))


def test_an_answer_that_fits_no_bucket_is_not_lost_in_silence():
    with pytest.raises(ValueError, match="5 tokens are in none of the buckets 1–4, 9"):
        by_length([Answer(5, 1.0)], [Bucket(1, 4), Bucket(9, 9)])


def test_the_change_of_length_is_paired():
    before = [Answer(tokens, 0.0) for tokens in (2, 30, 7, 100)]
    after = [Answer(a.tokens + 3, 0.0) for a in before]
    assert length_change(before, after) == (3.0, 3.0, 3.0), "each is 3 longer, so there is nothing to be unsure of"
    assert length_change(before, before) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="4 scores before and 3 after"):
        length_change(before, after[:3])
