"""The letter that a response chooses, as Tülu 3's evaluation extracts it (section 7.1 of the paper, unseen suite).

The prompt asks to end on "Therefore, the answer is (X)". In this order, the last match of: that phrase; a softer one
("the answer is X", "answer: X"), then "the correct option is X"; a letter in parentheses; a lone capital.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

from tulu_lightning.types import Verdict

__all__ = ["MultipleChoice", "chosen"]

_MARKS = r"[\s*_:`$\\]*"  # emphasis, a colon and the start of a formula between a phrase and its letter
_BOX = r"(?:boxed\{)?(?:\\?text(?:bf)?\{)?"
# "A" and "I" are words too: before another word they are a letter only where that gives a reason.
_WORD = r"(?!\s+(?!because\b|since\b|as\b|for\b|due\b|which\b|so\b|and\b|given\b|by\b|with\b)[a-z])"
_LETTER = rf"(?:([B-HJ])|([AI]){_WORD})(?![A-Za-z0-9'’])"
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"[Tt]he answer is{_MARKS}\(([A-J])\)",
        rf"(?i:answer(?:\s+(?:is|would be|must be)|\s*:)){_MARKS}{_BOX}\(?{_LETTER}",
        rf"(?i:(?:best|correct|right|final)\s+(?:option|choice|answer|one)(?:\s+is|:)?){_MARKS}{_BOX}\(?{_LETTER}",
        r"\(([A-J])\)",
        rf"(?<![A-Za-z0-9'’\-]){_LETTER}(?!-)",
    )
)


def chosen(response: str) -> str | None:
    """The letter A to J that the response chooses, or None.

    Example: `chosen("(A) is too small. Therefore, the answer is (C).")` is "C".
    """
    for pattern in _PATTERNS:
        match = None
        for match in pattern.finditer(response):  # noqa: B007 - only the last one is wanted
            pass
        if match is not None:
            return match[match.lastindex or 0]
    return None


@dataclass(frozen=True)
class MultipleChoice:
    """Right when the response chooses the target's letter; unparseable when it chooses none."""

    runs: ClassVar = "here"

    def __call__(self, response: str, target: str) -> Verdict:
        """Score 1 or 0.

        Raises:
            ValueError: the target is not a letter from A to J; `complaint` says so beforehand.
        """
        if complaint := self.complaint(target):
            raise ValueError(complaint)
        letter = chosen(response)
        if letter is None:
            return Verdict("unparseable", 0.0)
        return Verdict("right", 1.0) if letter == _bare(target) else Verdict("wrong", 0.0)

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None."""
        return None if re.fullmatch(r"[A-J]", _bare(target)) else f"{target!r} is not a letter from A to J"


def _bare(target: str) -> str:
    return target.strip().removeprefix("(").removesuffix(")")
