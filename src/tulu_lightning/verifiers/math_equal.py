r"""Whether two answers are the same mathematics.

Cheapest first: most answers are decided by their canonical strings or as exact fractions, in microseconds; sympy
(through math-verify) sees only what is left, and only what `math_guard` lets through.
"""

import re
from fractions import Fraction

from tulu_lightning.verifiers.math_guard import MAX_DIGITS, refusal, unevaluated
from tulu_lightning.verifiers.math_normal import braced, canonical, plain, repaired, right_of_equals
from tulu_lightning.verifiers.math_symbolic import symbolically_equal

__all__ = ["MAX_ANSWER", "equal", "hendrycks_equal", "number"]

MAX_ANSWER = 2_000
"""Characters of the longest answer that is looked into; a longer one can only be the label itself."""

SIGNIFICANT = 6
"""Correct digits that a decimal needs to stand for a fraction which it can only approach: 0.333333 is 1/3, 0.33 is not."""

_NUMBER = re.compile(
    r"([-+]?)(?:\\frac\{(-?[0-9]+)\}\{(-?[0-9]+)\}|([0-9]+)/([0-9]+)|([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}|"
    r"([0-9]*)\.([0-9]+)|([0-9]+)\.?)(\\%)?"
)
_BASE = re.compile(r"([0-9A-Z]+)_\{?([0-9]+)\}?")
_LETTER = re.compile(r"[({\[]?([A-Za-z])[)}\]]?[.:]?")
_WORDS = re.compile(r"[A-Za-z][A-Za-z .'-]*[A-Za-z]\.?")
_FUNCTIONS = re.compile(r"(?:sqrt|sin|cos|tan|log|ln|exp|pi|infty|infinity|theta)(?![A-Za-z])")


def equal(answer: str, label: str) -> bool:
    r"""Whether an answer, as stated, equals the label.

    Equal are: the same canonical strings; the same number, exactly (a percentage also as the fraction that it is, a
    decimal of at least six significant digits also as the fraction that it approaches); the same text but for its
    case; what math-verify holds for equal. Of an equation, its right side may be the answer.

    May take for ever on adversarial text that the guards do not know: call it where it can be killed.
    """
    if len(answer) > MAX_ANSWER:
        return answer.strip() == label.strip()
    label = plain(repaired(label))
    answer = plain(repaired(answer))
    if not answer or not label:
        return False
    sides = dict.fromkeys((answer, right_of_equals(answer)))
    return any(_cheap(side, label) for side in sides) or any(_symbolic(side, label) for side in sides)


def hendrycks_equal(one: str, other: str) -> bool:
    """Equality of Hendrycks' canonical strings; of the strings themselves where one has no canonical form."""
    try:
        return canonical(one) == canonical(other)
    except ValueError:
        return one == other


def number(text: str) -> tuple[Fraction, int | None, bool] | None:
    r"""A plain number (1/2, \frac{1}{2}, .5, 0.\overline{3}, 12, 12\%): value, digits it is approximate to (decimals only), percent sign."""
    match = _NUMBER.fullmatch(braced(text)) if len(text) <= 10 * MAX_DIGITS else None
    if match is None:
        return None
    sign, top, bottom, left, right, start, once, again, whole, decimals, integer, percent = match.groups()
    digits = None
    if decimals is not None:
        value = Fraction(int(whole + decimals), 10 ** len(decimals))
        digits = len((whole + decimals).lstrip("0"))
    elif again is not None:
        value = Fraction(int(start + once + again) - int(start + once or 0), 10 ** len(once) * (10 ** len(again) - 1))
    elif integer is not None:
        value = Fraction(int(integer))
    else:
        numerator, denominator = (top, bottom) if top is not None else (left, right)
        if int(denominator) == 0:
            return None
        value = Fraction(int(numerator), int(denominator))
    return (-value if sign == "-" else value), digits, percent is not None


def _cheap(answer: str, label: str) -> bool:
    if hendrycks_equal(answer, label):
        return True
    if _is_words(label):
        return answer.rstrip(".").casefold() == label.rstrip(".").casefold()
    based = _BASE.fullmatch(answer.replace(" ", "")), _BASE.fullmatch(label.replace(" ", ""))
    if any(based):
        return _same_digits(answer.replace(" ", ""), label.replace(" ", ""))
    if letter := _LETTER.fullmatch(label):
        stated = _LETTER.fullmatch(answer)
        return stated is not None and stated[1] == letter[1]
    one, other = number(answer), number(label)
    return one is not None and other is not None and _same_number(one, other)


def _same_digits(answer: str, label: str) -> bool:
    """Numbers of which one has its base as a subscript: the digits are the same, and so is the base if both name it."""
    (one, base), (other, label_base) = (
        (match[1], match[2]) if (match := _BASE.fullmatch(text)) else (text, None) for text in (answer, label)
    )
    return one == other and (base is None or label_base is None or base == label_base)


def _same_number(one: tuple[Fraction, int | None, bool], other: tuple[Fraction, int | None, bool]) -> bool:
    (a, a_digits, a_percent), (b, b_digits, b_percent) = one, other
    if a == b:
        return True
    if a_percent != b_percent:  # 50% is 50 (as canonical strings have it) and 1/2
        a, b = (a / 100, b) if a_percent else (a, b / 100)
        if a == b:
            return True
    if (a_digits is None) == (b_digits is None):
        return False
    decimal, exact, digits = (a, b, a_digits) if a_digits is not None else (b, a, b_digits)
    return (
        digits is not None and digits >= SIGNIFICANT and abs(decimal - exact) * 10 ** (digits - 1) < _magnitude(exact)
    )


def _magnitude(value: Fraction) -> Fraction:
    """The power of ten at or below |value|: one unit of its first digit."""
    power = Fraction(1)
    value = abs(value)
    while value and power > value:
        power /= 10
    while power * 10 <= value:
        power *= 10
    return power


def _is_words(text: str) -> bool:
    """Words rather than a product of variables: three letters or more in a row, no function name among them."""
    return bool(_WORDS.fullmatch(text) and re.search(r"[A-Za-z]{3}", text) and not _FUNCTIONS.search(text))


def _symbolic(answer: str, label: str) -> bool:
    if number(answer) is not None and number(label) is not None:
        return False  # decided
    if any(_BASE.fullmatch(text.replace(" ", "")) for text in (answer, label)):
        return False  # math-verify would drop the base
    if unevaluated(answer) and not unevaluated(label):
        return False  # a sum still to be done is no answer, unless the label is one
    if _is_words(label) or _is_words(answer) or refusal(answer) or refusal(label):
        return False
    return symbolically_equal(answer, label)
