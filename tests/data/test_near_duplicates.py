"""Near duplicates: against sets of plain tuples, against every pair, and by the odds that banding promises."""

import random

import numpy as np
import pytest

from tulu_lightning.core.ngrams import tokens
from tulu_lightning.data.near_duplicates import HASHES, bands, jaccard, near_duplicates, shingles, signatures

WORDS = [f"w{i}" for i in range(400)]


def plain(text, n=3):
    found = tokens(text)
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)} if len(found) >= n else {tuple(found)} - {()}


def share(one, other):
    return len(one & other) / len(one | other) if one | other else 1.0


def changed(draw, words, count):
    words = list(words)
    for at in draw.sample(range(len(words)), count):
        words[at] = draw.choice(WORDS)
    return " ".join(words)


@pytest.fixture(scope="module")
def texts():
    """200 texts, and of each of the first 60 a copy with up to nine words of 60 changed."""
    draw = random.Random(0)
    made = [" ".join(draw.choices(WORDS, k=60)) for _ in range(200)]
    return made + [changed(draw, text.split(), draw.randrange(10)) for text in made[:60]]


def test_jaccard_of_shingles_is_that_of_tuples(texts):
    special = ["", "One", "one two", "One, two!", "a b c", "a b c a b c", "Ä ö ü ß", "a-b c"]
    every = [*texts[:20], *texts[200:220], *special]
    sets = shingles(every)
    for one in range(len(every)):
        for other in range(one, len(every)):
            assert jaccard(sets[one], sets[other]) == share(plain(every[one]), plain(every[other]))


def test_signatures_estimate_it(texts):
    sets = shingles(texts)
    marks = signatures(sets)
    exact = np.array([jaccard(sets[i], sets[200 + i]) for i in range(60)])
    near = np.array([(marks[i] == marks[200 + i]).mean() for i in range(60)])
    # The share of equal values has a variance of s (1 - s) / 128: 4 standard deviations for each of 60, their mean within 2 %.
    assert (np.abs(near - exact) <= 4 * np.sqrt(exact * (1 - exact) / HASHES) + 1e-12).all()
    assert abs(near.mean() - exact.mean()) < 0.02


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_it_finds_what_comparing_every_pair_finds(texts, threshold):
    sets = [plain(text) for text in texts]
    kept, expected = [], {}
    for index, own in enumerate(sets):
        same = next((other for other in kept if share(own, sets[other]) >= threshold), None)
        if same is None:
            kept.append(index)
        else:
            expected[index] = same
    found = near_duplicates(texts, threshold)
    assert set(found.items()) <= set(expected.items()), "nothing that is none"
    assert len(found) >= 0.95 * len(expected) > 10


def test_the_odds_of_a_band():
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.95):
        rows = bands(threshold)
        assert (1 - threshold**rows) ** (HASHES // rows) <= 0.02
        more = next(r for r in range(rows + 1, HASHES + 1) if HASHES % r == 0)
        assert (1 - threshold**more) ** (HASHES // more) > 0.02
    assert bands(1.0) == HASHES


def test_the_first_stays_and_chains_do_not_grow():
    one = "the cat sat on the mat and looked at the moon"
    assert near_duplicates([one, one.upper(), "another text of a few words", f"{one}!"], 0.9) == {1: 0, 3: 0}
    assert near_duplicates(["", "", "a"], 0.5) == {1: 0}
    assert near_duplicates([], 0.5) == {}
