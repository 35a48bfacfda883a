"""Overlap by n-grams, worked out by hand."""

import pytest

from tulu_lightning.core.ngrams import field_share, grams, item_share, matched, token_spans, tokens, whole_share


def words(count, start=0):
    return [f"w{number}" for number in range(start, start + count)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" .,;\n", []),
        ("What is 2+2?", ["what", "is", "2+2"]),
        ("x^2 = y/3*4", ["x^2", "=", "y/3*4"]),
        ('He said: "(no)-way!"\\frac', ["he", "said", "no", "way", "frac"]),
        ("tab\tstays", ["tab\tstays"]),
        ("ÄÖ ΑΣ.Β", ["äö", "ασ", "β"]),  # a sigma before a full stop and a letter is not the last one
    ],
)
def test_tokens_are_split_at_the_listed_signs_and_nothing_else(text, expected):
    assert tokens(text) == expected
    assert len(token_spans(text)) == len(expected)


def test_spans_are_where_the_tokens_stand():
    text = "  What is 2+2? "
    assert [text[a:b] for a, b in token_spans(text)] == ["What", "is", "2+2"]


def test_a_token_matches_within_any_shared_ngram():
    test = [*words(10), "x", *words(9, 20)]
    row = [[*words(9), "y", *words(8, 20)]]
    # w0..w8 are nine in common: two 8-grams; w20..w27 one. w9, x and w28 are in none.
    assert matched(test, grams(row)) == [True] * 9 + [False, False] + [True] * 8 + [False]
    assert field_share(test, grams(row)) == 17 / 20


def test_seven_in_common_are_nothing_and_turns_are_apart():
    assert field_share(words(7), grams([words(7)])) == 0
    assert field_share(words(8), grams([words(4), words(4, 4)])) == 0
    assert field_share(words(8), grams([words(8)])) == 1
    assert field_share(words(7), grams([words(7)], 7), 7) == 1


def test_a_text_shorter_than_an_ngram_may_be_a_turn_as_a_whole():
    turns = [words(7), words(9)]
    assert field_share(words(7), grams(turns)) == 0
    assert field_share(words(7), grams(turns), turns=turns) == 1
    assert field_share(words(6), grams(turns), turns=turns) == 0
    assert field_share([], set(), turns=[[]]) == 0


def test_an_item_is_the_mean_of_its_fields():
    seen = grams([words(8)])
    assert item_share([words(8), words(4)], seen) == 0.5
    assert item_share([words(16), []], seen) == 0.25


def test_whole_texts():
    assert whole_share([["a", "b"]], [["a", "b"]]) == 1
    assert whole_share([["a", "b"]], [["a", "b", "c"]]) == 0
    assert whole_share([["a"], ["b"]], [["a"]]) == 0.5
    assert whole_share([[]], [[]]) == 0
