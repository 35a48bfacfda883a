r"""Answers to competition mathematics: what Tülu 3 trains MATH with (section 4.1 of the paper), without its mistakes.

`Math` reads a final answer wherever a response states it; `MathStrict` only in the sentence that the few-shot prompt asks
for. Three differences from the release (`math_release`): the answer stated last counts, where the release is content
when any of several is right; lists, intervals and matrices are compared as what they are, where its parser reads
"5, 6" as 5; and the normaliser works on words, where it deletes "ft" out of `\left`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from tulu_lightning.types import Verdict
from tulu_lightning.verifiers.math_equal import MAX_ANSWER, equal
from tulu_lightning.verifiers.math_extract import Stated, sentence, stated
from tulu_lightning.verifiers.math_normal import plain

__all__ = ["Math", "MathStrict"]


def _judge(response: str, target: str, find: Callable[[str], Stated | None]) -> Verdict:
    found = find(response)
    if found is None or not plain(found.text[:MAX_ANSWER]):
        return Verdict("unparseable", 0.0)
    if equal(found.text, target):
        return Verdict("right", 1.0)
    return Verdict("unparseable" if _is_prose(found.text) else "wrong", 0.0)


def _is_prose(text: str) -> bool:
    """Four words or more and not a digit, command or operator: talk, not an answer."""
    return len(text.split()) > 3 and not any(character.isdigit() or character in "\\=+*/^<>" for character in text)


def _complaint(target: str) -> str | None:
    return None if plain(target) else f"{target!r} is blank but for units and wrappers: no answer can equal it"


@dataclass(frozen=True)
class Math:
    r"""Right when the answer that the response states last equals the target (LaTeX, without `\boxed`).

    The answer is the content of the last box or of the final sentence, whichever comes later; without either, the
    last formula between dollar signs, `\(...\)` or `\[...\]`; without a formula, the whole response when it is one
    short line. Unparseable when there is none of these, when it is empty or prose, or when the box is never closed.
    """

    runs: ClassVar = "pool"

    def __call__(self, response: str, target: str) -> Verdict:
        """Score 1 or 0. Call it where it can be killed: no guard knows every text that sympy chokes on."""
        return _judge(response, target, stated)

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None."""
        return _complaint(target)


@dataclass(frozen=True)
class MathStrict:
    """As `Math`, but the answer must stand in "Final Answer: The final answer is ... I hope it is correct."."""

    runs: ClassVar = "pool"

    def __call__(self, response: str, target: str) -> Verdict:
        """Score 1 or 0. Call it where it can be killed."""
        return _judge(response, target, sentence)

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None."""
        return _complaint(target)
