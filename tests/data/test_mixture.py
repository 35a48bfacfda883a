"""Which rows of a source are drawn and how often: properties that hold for any numbers, and the refusals."""

import itertools
import math
from collections import Counter

import pytest

from tulu_lightning.data.mixture import order, repeats, wanted
from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError

TOTALS = (1, 2, 7, 100, 1001)


def source(name="s", **settings) -> Source:
    return Source(name, rows="some.function", **settings)


def drawn(settings, total, seed=0, name="s") -> list[int]:
    """The rows that are used if every row is usable."""
    made = source(name, **settings)
    indices = list(order(made, total, seed))
    return indices[: wanted(made, total)]


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize("settings", [{}, {"fraction": 1.0}, {"cap": 5000}, {"upsample": 3.0}])
def test_where_nothing_is_drawn_all_rows_come_in_their_own_order(settings, total):
    assert drawn(settings, total) == list(range(total))


@pytest.mark.parametrize("total", TOTALS)
def test_a_drawn_row_comes_once_and_there_are_as_many_as_asked(total):
    for share in (0.01, 0.1, 0.25, 0.5, 0.7, 0.99):
        expected = math.floor(share * total + 0.5 + 1e-9)
        if expected:
            rows = drawn({"fraction": share}, total)
            assert len(rows) == len(set(rows)) == expected
    for number in {1, total // 2 or 1, total}:
        for setting in ("count", "cap"):
            rows = drawn({setting: number}, total)
            assert len(rows) == len(set(rows)) == number
            assert set(rows) <= set(range(total))


def test_counts_add_up_exactly_where_decimals_do_not():
    assert len(drawn({"fraction": 0.29}, 100)) == 29  # 28.999999999999996 in binary
    assert len(drawn({"fraction": 0.145}, 100)) == 15  # 14.499999999999998, but a half goes up
    assert len(drawn({"fraction": 0.5}, 5)) == 3  # halves up


@pytest.mark.parametrize("settings", [{"fraction": 0.3}, {"count": 30}, {"cap": 30}])
def test_the_draw_depends_on_seed_and_name_and_on_nothing_else(settings):
    first = drawn(settings, 100, seed=1)
    assert drawn(settings, 100, seed=1) == first
    assert drawn({**settings, "upsample": 2.0}, 100, seed=1) == first
    others = [drawn(settings, 100, seed=2), drawn(settings, 100, seed=1, name="t")]
    assert all(sorted(other) != sorted(first) for other in others)
    assert first != list(range(30))


def test_a_larger_sample_contains_a_smaller_one():
    for setting in ("count", "cap"):
        samples = [set(drawn({setting: number}, 100)) for number in (10, 30, 99)]
        assert samples[0] < samples[1] < samples[2]
    samples = [set(drawn({"fraction": share}, 100)) for share in (0.1, 0.3, 0.99)]
    assert samples[0] < samples[1] < samples[2]


def test_every_row_is_as_likely_as_any_other():
    # 400 draws of 5 from 20: each row 100 times on average, with a standard deviation of sqrt(400 · 0.25 · 0.75) = 8.7
    hits = Counter(itertools.chain.from_iterable(drawn({"count": 5}, 20, seed) for seed in range(400)))
    assert len(hits) == 20
    assert all(abs(hits[row] - 100) < 5 * 8.7 for row in range(20))


def test_an_unusable_row_is_replaced_by_the_next_of_the_order():
    rows = list(order(source(count=3), 10, 0))
    assert sorted(rows) == list(range(10))


@pytest.mark.parametrize("kept", [1, 2, 3, 24, 101])
@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0, 2.5, 3.3, 10.0])
def test_upsampling_uses_every_row_and_none_more_than_once_more_than_another(kept, factor):
    times = Counter(repeats(source(upsample=factor), kept, 0))
    assert set(times) == set(range(kept))
    assert set(times.values()) <= {math.floor(factor), math.ceil(factor)}
    assert times.total() == math.floor(factor * kept + 0.5 + 1e-9)


def test_upsampling_by_hand():
    assert len(repeats(source(upsample=10), 24, 0)) == 240  # the paper's hard-coded answers
    assert list(repeats(source(), 3, 0)) == [0, 1, 2]
    assert repeats(source(upsample=2.0), 2, 0) == [0, 1, 0, 1]
    half = repeats(source(upsample=2.5), 4, 0)
    assert half[:8] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert len(set(half[8:])) == 2


def test_which_rows_are_used_once_more_depends_on_the_seed():
    chosen = {tuple(repeats(source(upsample=1.5), 20, seed)[20:]) for seed in range(5)}
    assert len(chosen) == 5
    assert list(repeats(source(upsample=1.5), 20, 3)) == list(repeats(source(upsample=1.5), 20, 3))


@pytest.mark.parametrize(
    ("settings", "total", "complaint"),
    [
        ({"fraction": 1.01}, 10, r"fraction is 1\.01"),
        ({"fraction": -0.1}, 10, r"fraction is -0\.1"),
        ({"fraction": 0}, 10, "fraction is 0"),
        ({"fraction": 0.04}, 10, r"fraction is 0\.04, which of 10 rows is none"),
        ({"count": 11}, 10, "count is 11, and the source has 10 rows"),
        ({"count": 3, "cap": 3}, 10, "both count and cap are given"),
        ({"count": 3, "fraction": 0.3}, 10, "both fraction and count are given"),
        ({"upsample": 0.9}, 10, r"upsample is 0\.9"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, total, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        order(source("mine", **settings), total, 0)
    assert caught.value.where == "source 'mine'"
    assert caught.value.remedy
