"""The last number of a response against a target number: what Tülu 3's GSM8K verifier does (section 4.1 of the paper).

Three differences from its release, each of which misjudged: the sign is kept, thousands commas are taken out only where
they group digits by three, and numbers are compared as exact decimals instead of as strings ("60.0" is 60).
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar

from tulu_lightning.types import Verdict

__all__ = ["LastNumber", "last_number"]

_DIGITS = r"(?:[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# A hyphen after a digit, letter, closing bracket or hyphen joins or subtracts ("12-7", "step-3", "--3"): no sign.
# No alternative can match again what another one gave up, so the scan is linear in the text.
# A space behind the sign makes it a subtraction, but for what comes right after "=", ":" or "is".
_SIGN = r"(?<![\w.)\]}\-\u2212])[-+\u2212]|(?:(?<==)|(?<== )|(?<=: )|(?<=\bis ))[-\u2212] "
_NUMBER = re.compile(rf"({_SIGN})?(?:\\?[$€£])?(?:(?<=[$€£])([-\u2212]))?({_DIGITS})")


def last_number(text: str) -> Decimal | None:
    r"""The last number in the text, or None.

    Reads a sign that touches the number (hyphen, plus or U+2212; with a space only in "= - 5", ": - 5", "is - 5"), a currency sign after or before it ("-$5", "$-5",
    also `\$`), thousands commas (also LaTeX's `{,}`) and decimals. Digits of other scripts, exponents and fractions are not read.

    Example: `last_number("12 - 60 = -48, so we lose $1,250.50.")` is `Decimal("1250.50")`.
    """
    match = None
    for match in _NUMBER.finditer(text):  # noqa: B007 - only the last one is wanted
        pass
    return _decimal(match) if match else None


def _decimal(match: re.Match[str]) -> Decimal:
    before, after, digits = match.groups()
    before = before and before.strip()
    # Decimal takes any number of digits in linear time; int() would not.
    number = Decimal(digits.replace("{,}", "").replace(",", ""))
    # copy_negate, because the unary minus rounds to the context's 28 digits.
    return number.copy_negate() if {before, after} & {"-", "\u2212"} else number


@dataclass(frozen=True)
class LastNumber:
    """Right when the last number of the response equals the target; unparseable when it holds no number."""

    runs: ClassVar = "here"

    def __call__(self, response: str, target: str) -> Verdict:
        """Score 1 or 0.

        Raises:
            ValueError: the target is not a number; `complaint` says so beforehand.
        """
        wanted = _NUMBER.fullmatch(target.strip())
        if wanted is None:
            raise ValueError(self.complaint(target))
        found = last_number(response)
        if found is None:
            return Verdict("unparseable", 0.0)
        return Verdict("right", 1.0) if found == _decimal(wanted) else Verdict("wrong", 0.0)

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None."""
        return None if _NUMBER.fullmatch(target.strip()) else f"{target!r} is not a number"
