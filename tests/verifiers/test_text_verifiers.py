"""Regular expressions, token F1 and multiple choice beyond their audit cases."""

import json
import random
from collections import Counter

import pytest

from tulu_lightning.verifiers.multiple_choice import MultipleChoice, chosen
from tulu_lightning.verifiers.regex import Regex
from tulu_lightning.verifiers.string_f1 import StringF1, f1, tokens


@pytest.mark.parametrize("target", ["(", "[", "*", "(?P<a>x)(?P<a>y)", "a{2,1}"])
def test_a_target_that_is_no_pattern_is_named(target):
    assert "not a regular expression" in (Regex().complaint(target) or "")
    with pytest.raises(ValueError, match="not a regular expression"):
        Regex()("x", target)


def test_an_empty_pattern_is_refused():
    assert Regex().complaint("") == "an empty pattern is found everywhere"
    assert Regex().complaint("a|b") is None


def slow_f1(response: list[str], label: list[str]) -> float:
    """SQuAD's: precision and recall over the tokens in common."""
    common = sum((Counter(response) & Counter(label)).values())
    if not common:
        return 0.0
    precision, recall = common / len(response), common / len(label)
    return 2 * precision * recall / (precision + recall)


def test_token_f1_is_the_harmonic_mean_of_precision_and_recall():
    draw = random.Random(3)
    for _ in range(200):
        one, other = (draw.choices("abcde", k=draw.randint(1, 6)) for _ in range(2))
        assert f1(one, other) == pytest.approx(slow_f1(one, other), abs=1e-12)
        assert f1(one, other) == f1(other, one)
        assert (f1(one, other) == 1.0) == (Counter(one) == Counter(other))


def test_partial_credit_is_worked_out_by_hand():
    verify = StringF1()
    # tokens: paris france | paris -> 1 in common; precision 1/2, recall 1; F1 2/3
    assert verify("Paris, France", "Paris").score == pytest.approx(2 / 3)
    # the best of: "big red dog" has 2 of 2 tokens in 3 -> 4/5; "cat" none
    assert verify("red dog", json.dumps(["cat", "big red dog"])).score == pytest.approx(4 / 5)
    assert tokens("The U.S. is a\tbig, BIG place") == ["us", "is", "big", "big", "place"]


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("[1, 2]", "not one of strings"),
        ("[]", "not one of strings"),
        ('["Paris", ""]', "a label without a word"),
        ("the", "a label without a word"),
        ("", "a label without a word"),
        ("Paris", None),
        ('["Paris", "London"]', None),
        ("[not JSON", None),
        ("[" * 100_000 + "x", None),  # deeper than the JSON reader goes
    ],
)
def test_labels_are_checked(target, complaint):
    found = StringF1().complaint(target)
    assert (complaint in found) if complaint and found else found == complaint
    if complaint:
        with pytest.raises(ValueError, match=complaint):
            StringF1()("Paris", target)


@pytest.mark.parametrize("letter", "ABCDEFGHIJ")
@pytest.mark.parametrize(
    "form",
    [
        "Therefore, the answer is ({}).",
        "**Therefore, the answer is ({})**",
        "(Z) no. The answer is {}.",
        "Answer: {}",
        "The correct answer is: {}",
        "The answer is \\boxed{{{}}}",
        "I pick ({}).",
        "{}",
        "{})",
    ],
)
def test_every_letter_is_read_in_every_form(form, letter):
    assert chosen(form.format(letter)) == letter


@pytest.mark.parametrize("target", ["K", "a", "AB", "", "1", "Α"])
def test_a_target_that_is_no_letter_is_named(target):
    assert "not a letter from A to J" in (MultipleChoice().complaint(target) or "")
    with pytest.raises(ValueError, match="not a letter"):
        MultipleChoice()("A", target)


def test_a_target_may_stand_in_parentheses():
    assert MultipleChoice()("The answer is (B)", "(B)").outcome == "right"


@pytest.mark.parametrize(
    "text", ["(" * 1_000_000, "answer " * 150_000, "A" * 1_000_000, "A " * 500_000, "the answer is" + " " * 1_000_000]
)
def test_a_megabyte_is_read_in_one_pass(text):
    assert MultipleChoice()(text, "B").outcome in ("wrong", "unparseable")
