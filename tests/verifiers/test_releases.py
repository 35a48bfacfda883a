"""The release's verifiers, each mistake by name: they are there to reproduce its numbers."""

import pytest

from tulu_lightning.verifiers.math_equal import hendrycks_equal
from tulu_lightning.verifiers.math_normal import canonical
from tulu_lightning.verifiers.registry import get


@pytest.mark.parametrize(
    ("response", "target", "outcome"),
    [
        ("The answer is 18.", "18", "right"),
        ("The answer is -5.", "5", "right"),  # the sign of an integer is lost
        ("The answer is -5.", "-5", "wrong"),
        ("The answer is -5.5", "-5.5", "right"),  # of a decimal it is kept
        ("12-7.5", "-7.5", "right"),  # and made up
        ("18.00", "18", "wrong"),  # text, not numbers
        ("1,250", "1250", "right"),
        ("1,250", "1,250", "wrong"),  # the target's comma stays
        ("1,2", "12", "right"),  # any comma between digits goes
        ("1,2,3", "3", "right"),  # but not the one after a digit that was just taken: "12,3"
        ("Yes", "yes", "right"),  # without a number, the whole text
        ("", "18", "wrong"),  # nothing is unparseable
    ],
)
def test_gsm8k_as_released(response, target, outcome):
    assert get("gsm8k_release")(response, target).outcome == outcome


@pytest.mark.parametrize(
    ("response", "target", "outcome"),
    [
        (r"\boxed{5}", "5", "right"),
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", "right"),  # sympy
        (r"\boxed{x^2+2x+1}", "(x+1)^2", "right"),
        (r"\boxed{5} Final Answer: The final answer is $6$. I hope it is correct.", "5", "right"),  # any candidate
        (r"\boxed{5, 6}", "5", "right"),  # parsed up to the comma
        (r"Final Answer: The final answer is $1,2$. I hope it is correct.", "12", "right"),  # joined
        (r"\boxed{2,1}", "1,2", "wrong"),
        ("It is $5$.", "5", "right"),  # between the last two dollars
        ("It is $$5$$", "5", "wrong"),  # which is nothing here
        (r"\fbox{5}", "5", "wrong"),
        ("5", "5", "right"),  # the whole output
        ("The answer is 5", "5", "wrong"),
        ("", "5", "wrong"),
    ],
)
def test_math_as_released(response, target, outcome):
    assert get("math_release")(response, target).outcome == outcome


def test_sympys_parser_runs_without_a_word(capfd):
    get("math_release")(r"\boxed{a+b}", "b+a")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["gsm8k_release", "math_release"])
def test_a_blank_target_is_refused(name):
    assert "blank" in (get(name).complaint(" ") or "")
    assert get(name).complaint("anything") is None


def test_a_text_without_a_canonical_form_equals_itself_only():
    bad = r"\frac"
    with pytest.raises(ValueError, match="a fraction of nothing"):
        canonical(bad)
    assert hendrycks_equal(bad, bad)
    assert not hendrycks_equal(bad, "1")
