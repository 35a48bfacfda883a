"""The answer in DeepMind Mathematics' sentence, compared as text, then as mathematics."""

import re
from dataclasses import dataclass
from typing import ClassVar

from tulu_lightning.types import Verdict
from tulu_lightning.verifiers.math_equal import equal
from tulu_lightning.verifiers.math_symbolic import symbolically_equal

__all__ = ["MathExpression", "stated"]

_SENTENCE = re.compile(r"therefore, the final answer is (.*?)\. I hope it is correct", re.IGNORECASE | re.DOTALL)
_SOFTER = re.compile(r"(?:final )?answer is:?\s*(\S[^\n]*?)\.?\s*(?:\n|$)", re.IGNORECASE)


def stated(response: str) -> str | None:
    """The answer that a response states last, in the sentence asked for or after "the answer is"; None without either.

    Example: "Therefore, the final answer is 2, 10. I hope it is correct." states "2, 10".
    """
    for pattern in (_SENTENCE, _SOFTER):
        found = pattern.findall(response)
        if found:
            return found[-1].strip().strip("$").strip()
    return None


@dataclass(frozen=True)
class MathExpression:
    """Right when the stated answer is the target's text, or the same mathematics; `x**2` and `x^2` are one."""

    runs: ClassVar = "pool"

    def warm(self) -> None:
        """Import what a call needs."""
        symbolically_equal("x + 1", "1 + x")

    def __call__(self, response: str, target: str) -> Verdict:
        """Score 1 or 0; unparseable where no answer is stated."""
        found = stated(response)
        if not found:
            return Verdict("unparseable", 0.0)
        right = _bare(found) == _bare(target) or equal(_latex(found), _latex(target))
        return Verdict("right" if right else "wrong", float(right))

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None."""
        return None if target.strip() else f"{target!r} is blank"


def _bare(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _latex(text: str) -> str:
    return re.sub(r"\*\*(-?\w+)", r"^{\1}", text).replace("**", "^").replace("*", " \\cdot ")
