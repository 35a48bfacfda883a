"""GSM8K as Tülu 3's release verified it, mistakes and all: to reproduce its numbers, not to train with.

What is wrong with it: numbers are compared as text, so 18.00 is not 18 and 018 not 18; a sign is kept only in front of
decimals, so "-5" is 5, while "12-7.5" is -7.5; commas go out between any two digits, so the list "1,2" is 12; commas
in the target stay, so that no response can be right where it has one; and a response without a number is compared
as a whole, so that nothing is unparseable. Facts: the release's `verify_gsm8k_sample`.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

from tulu_lightning.types import Verdict

__all__ = ["Gsm8kRelease"]

_COMMA = re.compile(r"(\d),(\d)")
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")


@dataclass(frozen=True)
class Gsm8kRelease:
    """Right when the last number of the response is the target's text, but for case; everything else is wrong."""

    runs: ClassVar = "pool"

    def __call__(self, response: str, target: str) -> Verdict:
        """Score 1 or 0."""
        numbers = _NUMBER.findall(_COMMA.sub(r"\1\2", response))
        found = numbers[-1] if numbers else response
        return Verdict("right", 1.0) if found.lower() == target.lower() else Verdict("wrong", 0.0)

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None."""
        return None if target.strip() else f"{target!r} is blank: no response can be right"
