import builtins
import random
import subprocess
import sys
from fractions import Fraction
from threading import Thread

import pytest

from tulu_lightning.types import Verdict
from tulu_lightning.verifiers.math_answer import Math, MathStrict
from tulu_lightning.verifiers.math_equal import equal, number
from tulu_lightning.verifiers.math_extract import boxed, formula, sentence, stated, whole
from tulu_lightning.verifiers.math_guard import refusal
from tulu_lightning.verifiers.math_normal import plain, repaired, right_of_equals

SENTENCE = "Final Answer: The final answer is $7$. I hope it is correct."


def text_of(found):
    return None if found is None else found.text


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"a \boxed{1} b \boxed{2} c", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed {3}", "3"),
        (r"\boxed 3$.", "3"),
        (r"\fbox{4}", "4"),
        (r"\boxed{1} \fbox{4}", "4"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{1} \boxed{2", None),
        (r"\boxedup{1}", None),
        ("no box", None),
    ],
)
def test_the_last_box_is_read_with_its_braces(text, content):
    assert text_of(boxed(text)) == content


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("$1$ and $2$", "2"),
        ("$$1$$", "1"),
        (r"\(1\) \[2\]", "2"),
        (r"\$1 and $2$", "2"),
        ("$1$ costs $2", "1"),
        ("$a$$b$", "b"),
        (r"\[ x \\[2pt] y \]", r"x \\[2pt] y"),
        ("no formula", None),
        ("$5", None),
    ],
)
def test_the_last_formula_is_read_between_its_delimiters(text, content):
    assert text_of(formula(text)) == content


def test_the_answer_stated_last_is_the_final_one():
    box = r"\boxed{6}"
    assert text_of(stated(f"{box} {SENTENCE}")) == "7"
    assert text_of(stated(f"{SENTENCE} {box}")) == "6"
    assert text_of(stated(f"$1$ {box} $2$")) == "6"  # a formula counts only where neither is
    assert text_of(stated("$1$ $2$ so it is 3")) == "2"
    assert text_of(stated(" The answer is 3. ")) == "3"
    assert stated("one line\nand another") is None
    assert text_of(sentence(SENTENCE + SENTENCE.replace("7", "8"))) == "8"
    assert whole("x" * 301) is None


def test_three_outcomes_are_told_apart_in_both_variants():
    right, wrong, unparseable = Verdict("right", 1.0), Verdict("wrong", 0.0), Verdict("unparseable", 0.0)
    assert [Math()(text, "7") for text in (r"\boxed{7}", r"\boxed{8}", "no idea at all, sorry")] == [
        right,
        wrong,
        unparseable,
    ]
    assert [MathStrict()(text, "7") for text in (SENTENCE, SENTENCE.replace("7", "8"), r"\boxed{7}")] == [
        right,
        wrong,
        unparseable,
    ]


def spellings(value: Fraction) -> list[str]:
    top, bottom, sign = abs(value.numerator), value.denominator, "-" if value < 0 else ""
    return [
        rf"{sign}\frac{{{top}}}{{{bottom}}}",
        rf"\dfrac{{{sign}{top}}}{{{bottom}}}",
        f"{sign}{top}/{bottom}",
        rf"x = {sign}\tfrac{{{3 * top}}}{{{3 * bottom}}}",
        rf"\left( {sign}{top} \cdot {bottom}^{{-1}} \right)",
    ]


def test_a_number_equals_itself_in_every_spelling_and_no_neighbour():
    draw = random.Random(5)
    for _ in range(12):
        value = Fraction(draw.choice((-1, 1)) * draw.randint(2, 99), draw.randint(2, 30))
        other = value + Fraction(1, draw.randint(2, 50))
        for answer in spellings(value):
            assert equal(answer, spellings(value)[0]), answer
            assert not equal(answer, spellings(other)[0]), (answer, other)


def test_polynomials_equal_their_factors_and_no_other():
    draw = random.Random(7)
    for _ in range(6):
        p, q = draw.randint(1, 9), draw.randint(1, 9)
        label = f"x^2+{p + q}x+{p * q}"  # (x + p)(x + q), worked out
        assert equal(f"(x+{p})(x+{q})", label)
        assert not equal(f"(x+{p})(x+{q + 1})", label)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", Fraction(12)),
        ("-1.50", Fraction(-3, 2)),
        (".5", Fraction(1, 2)),
        (r"\frac12", Fraction(1, 2)),
        (r"-\frac{1}{-2}", Fraction(1, 2)),
        (r"0.1\overline{6}", Fraction(1, 6)),
        (r"0.\overline{142857}", Fraction(1, 7)),
        (r"2.\overline{9}", Fraction(3)),
        (r"\frac{1}{0}", None),
        ("x", None),
        ("٤٢", None),
    ],
)
def test_plain_numbers_are_read_as_exact_fractions(text, value):
    found = number(text)
    assert (found and found[0]) == value


@pytest.mark.parametrize(
    ("answer", "label", "same"),
    [
        ("0.333333", r"\frac{1}{3}", True),
        ("0.3333334", r"\frac{1}{3}", True),
        ("0.333", r"\frac{1}{3}", False),
        ("0.333433", r"\frac{1}{3}", False),
        ("0.000000", r"\frac{1}{30000000}", False),  # no significant digit at all
        ("0.0000000333333", r"\frac{1}{30000000}", True),
        ("0.3333333", "0.3333334", False),  # two decimals are what they say
    ],
)
def test_a_decimal_stands_for_a_fraction_from_six_significant_digits_on(answer, label, same):
    assert equal(answer, label) is same
    assert equal(label, answer) is same


@pytest.mark.parametrize(
    ("answer", "label", "same"),
    [
        (r"1.6 \cdot 10^{-19}", r"1.6 \times 10^{-19}", True),
        (r"1.6 \times 10^{-20}", r"1.6 \times 10^{-19}", False),
        ("0.00000017", r"1.6 \times 10^{-7}", False),
        ("0.00000016", r"1.6 \times 10^{-7}", True),
        (r"1.7 \times 10^{-7} x", r"1.6 \times 10^{-7} x", False),
        (r"(x + 1)^2 - x^2 - 2x - 1", "0", True),  # at a point it is a rounding error, not 0
        (r"\sqrt{3 + 2\sqrt{2}} - \sqrt{2} - 1", "0", True),
        (r"1.41421 \times 10^{0}", r"\sqrt{2} \cdot 1.0", False),  # as before: six decimals decide
    ],
)
def test_small_numbers_are_not_rounded_to_one(answer, label, same):
    assert equal(answer, label) is same
    assert equal(label, answer) is same


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (r"5\text{ cm}^2", "5"),
        (r"$5$", "5"),
        (r"\left(1, 2\right)", "(1, 2)"),
        (r"\infty", r"\infty"),
        (r"12{,}345{,}678", "12345678"),
        ("feet", "feet"),
        (r"\text{lemon}", "lemon"),
        (r"3 \text{ and } 4", "3, 4"),
        ("5 percent", r"5\%"),
        ("the 5 apples", "5 apples"),
    ],
)
def test_units_and_wrappers_go_and_commands_and_words_stay(text, left):
    assert plain(text) == left


def test_damage_of_a_published_normaliser_is_repaired():
    assert repaired(r"\le(-\iny,2\right)\cup\le[3,4\right)") == r"(-\infty ,2\right)\cup[3,4\right)"
    assert repaired(r"x\le(3)") == r"x\le(3)"  # a comparison
    assert repaired(r"\frac{9}{{}5}") == r"\frac{9}{5}"


def test_the_right_side_is_taken_of_a_chain_only():
    assert right_of_equals("a = b = 3") == "3"
    assert right_of_equals("x=1, y=2") == "x=1, y=2"
    assert right_of_equals(r"x \le 2 = y") == r"x \le 2 = y"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("9^{9^{9^9}}", "tower"),
        ("9**9**9", "tower"),
        ("x^{2^{99}}", "tower"),
        ("2^{3!}!", "factorial of"),
        ("(9^{9999})^{9999}", "power"),
        ("(x+1)^{9999}", "power over"),
        ("2^{100001}", "exponent over"),
        ("10001!", "factorial over"),
        ("((9!)!)!", "factorial of"),
        ("3!!", "factorial of"),
        (r"\binom{99999}{5}", "binomial over"),
        ("1" * 101, "more than 100 digits"),
        ("x" * 401, "longer than 400"),
        ("(" * 26, "deeper than 25"),
        ("\ud800", "surrogate"),
        (r"\sum_{i=1}^n \sum_{j=1}^n ij", "several sums"),
    ],
)
def test_what_would_take_for_ever_is_refused_with_its_reason(text, why):
    assert why in (refusal(text) or "nothing")


@pytest.mark.parametrize(
    "text",
    ["2^{2005}", r"\frac{1}{2004!}", r"\binom{100}{50}", "(x+1)^{10}", "e^{x^2}", "2^{2^3}", "x^{2^n}", "(n+1)!",
     r"(2^{10})^{3}", "-8x^4+7x^2-7x+8", r"e^{-(x-1)^{2}}"],
)  # fmt: skip
def test_sane_answers_are_not_refused(text):
    assert refusal(text) is None


ADVERSARIAL = {
    "digits": "9" * 1_000_000,
    "braces": "{" * 1_000_000,
    "backslashes": "\\" * 1_000_000,
    "spaces": "x" + " " * 1_000_000 + "x",
    "carets": "9^" * 500_000,
    "fractions": r"\frac" * 200_000,
    "wrappers": r"\text{" * 100_000 + "}" * 100_000,
    "equals": "=" * 1_000_000,
    "and": " and" * 250_000,
    "surrogates": "\udcff" * 1_000_000,
    "digits of other scripts": "٤" * 1_000_000,
    "dollars and percents": "$%" * 500_000,
}


@pytest.mark.parametrize("text", ADVERSARIAL.values(), ids=ADVERSARIAL)
@pytest.mark.parametrize(
    "frame", ["{}", "\\boxed{{{}}}", "${}$", "Final Answer: The final answer is {}. I hope it is correct."]
)
def test_a_megabyte_of_anything_is_judged_and_is_not_the_answer(text, frame):
    for size in (300, len(text)):  # short enough to be looked into, and not
        assert Math()(frame.format(text[:size]), "5").outcome in ("wrong", "unparseable")


def test_sympy_works_outside_the_main_thread():
    """math-verify's own time limits are signals, which raise there: they must be off."""
    found = []
    thread = Thread(target=lambda: found.append(equal("x^2+34x+289", "(x+17)^2")))
    thread.start()
    thread.join()
    assert found == [True]


def test_no_text_is_evaluated_as_python(monkeypatch, tmp_path):
    """sympy compiles code of its own, and reads the digits of a number by eval: no other text of an answer may be in it."""
    sources = []
    for name in ("eval", "exec", "compile"):
        real = getattr(builtins, name)
        monkeypatch.setattr(
            builtins, name, lambda source, *a, real=real, **k: (sources.append(str(source)), real(source, *a, **k))[1]
        )
    trap = tmp_path / "trap"
    for attack in (f"open('{trap}', 'w')", "71717*(3-71717)/6", "1+71717*x", "exec('71717')+x"):
        assert not equal(attack, "x^2+46x+530")
    assert equal("71717+71718x", "71718x+71717")
    assert not trap.exists()
    seen = {source.strip() for source in sources if "717" in source or "trap" in source or "exec" in source}
    assert seen == {"Integer (71717 )", "Integer (71718 )"}


def test_expressions_that_differ_at_a_point_are_never_simplified(monkeypatch):
    import math_verify

    monkeypatch.setattr(math_verify, "verify", lambda *a, **k: pytest.fail("simplified"))
    assert not equal("x^3+5x+1", "x^3+5x+2")
    assert not equal(r"\sqrt{2}+\sqrt{3}", r"\sqrt{5}+a")


def test_importing_the_registry_loads_neither_sympy_nor_torch():
    code = (
        "import sys, tulu_lightning.verifiers.registry as r; assert len(r.VERIFIERS) > 5; "
        "print(sorted({'torch', 'sympy', 'math_verify'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_a_blank_target_is_named():
    for target in ("", "  ", "$ $", r"\text{ }"):
        assert "blank" in (Math().complaint(target) or "")
        assert MathStrict().complaint(target) is not None
    assert Math().complaint("0") is None
