from decimal import Decimal

import pytest

from tulu_lightning.types import Verdict
from tulu_lightning.verifiers.exact import Exact
from tulu_lightning.verifiers.last_number import LastNumber, last_number

RIGHT, WRONG, UNPARSEABLE = Verdict("right", 1.0), Verdict("wrong", 0.0), Verdict("unparseable", 0.0)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", "42"),
        ("The answer is -42.", "-42"),  # Tülu 3's release reads 42 here
        ("It is \u22127", "-7"),  # the typographic minus
        ("+5", "5"),
        ("12-7", "7"),  # a subtraction, not a sign
        ("12 - 7", "7"),
        ("x = -3", "-3"),
        ("x=-3", "-3"),
        ("(2)-3", "3"),
        ("step-3", "3"),
        ("well --5", "5"),
        ("\\boxed{-5}", "-5"),
        ("**-5**", "-5"),
        ("$1,250.50", "1250.50"),
        ("-$20", "-20"),
        ("$-20", "-20"),
        ("\\$-20", "-20"),
        ("5 \u20ac-20", "-20"),
        ("The answer is - 3.", "-3"),
        ("x = - 3", "-3"),
        ("Answer: \u2212 3", "-3"),
        ("10 apples - 3", "3"),
        ("this - 3", "3"),  # ends on "is", but is another word
        ("1{,}234{,}567", "1234567"),
        ("{1},{234}", "234"),
        ("1,234,567", "1234567"),
        ("12,345.6 km", "12345.6"),
        ("1,23", "23"),  # not thousands: two numbers
        ("3,4,5", "5"),
        ("1,2345", "2345"),
        ("1234,567", "567"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("It costs 3.50.", "3.50"),
        ("007", "7"),
        ("first 1, then 2, so 3", "3"),
    ],
)
def test_the_last_number_is_read_with_its_sign_commas_and_decimals(text, number):
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "sixty", "--", "$", "…", "no digits. at all,"])
def test_text_without_a_digit_has_no_number(text):
    assert last_number(text) is None


def test_three_outcomes_are_told_apart():
    verify = LastNumber()
    assert verify("30 + 30 = 60", "60") == RIGHT
    assert verify("30 + 30 = 61", "60") == WRONG
    assert verify("I do not know", "60") == UNPARSEABLE


@pytest.mark.parametrize(("response", "target"), [("60.0", "60"), ("1,000", "1000"), ("1000", "1,000"), ("-0", "0")])
def test_numbers_are_compared_by_value(response, target):
    assert LastNumber()(response, target) == RIGHT


def test_comparison_is_exact_where_floats_are_not():
    verify = LastNumber()
    assert verify("9007199254740993", "9007199254740992") == WRONG  # 2^53 + 1: equal as floats
    assert verify("0.30000000000000000001", "0.3") == WRONG
    # More digits than decimal's default context keeps (28), with a sign that must not round them.
    assert verify("-1234567890123456789012345678901", "-1234567890123456789012345678902") == WRONG


@pytest.mark.parametrize("text", ["7" * 1_000_000, "-" * 1_000_000, "1," * 500_000, "123," * 250_000, "1 " * 500_000])
def test_a_megabyte_is_judged_in_one_pass(text):
    # Matching that goes back, or int() on the digits, takes hours here.
    assert LastNumber()(text, "60").outcome in ("wrong", "unparseable")


def test_a_target_that_is_no_number_is_named():
    assert LastNumber().complaint("sixty") == "'sixty' is not a number"
    assert LastNumber().complaint("6 0") == "'6 0' is not a number"
    assert LastNumber().complaint(" -1,000.5\n") is None
    with pytest.raises(ValueError, match="'sixty' is not a number"):
        LastNumber()("60", "sixty")


def test_exact_ignores_only_surrounding_white_space():
    verify = Exact()
    assert verify(" yes\n", "yes") == RIGHT
    assert verify("Yes", "yes") == WRONG
    assert verify("y es", "yes") == WRONG
    assert verify(" \n", "yes") == UNPARSEABLE
    assert verify.complaint(" ") is not None
    assert verify.complaint("yes") is None
