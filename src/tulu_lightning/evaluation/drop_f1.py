"""DROP's F1 (Dua et al. 2019, section 5.2): words of the answer against words of each gold answer, numbers exactly."""

import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tulu_lightning.types import Verdict

__all__ = ["DropF1", "f1_of", "words"]

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


@dataclass(frozen=True)
class DropF1:
    """Score is the best F1 over the gold answers; right only at F1 1.

    The target is a JSON list of answers, each a list of spans. A response is one span: of an answer with several it
    can match one, and the others count as missed.
    """

    runs: ClassVar = "here"

    def __call__(self, response: str, target: str) -> Verdict:
        """Score in [0, 1]."""
        score = max(f1_of(response, spans) for spans in json.loads(target))
        return Verdict("right" if score == 1.0 else "wrong", score)

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None."""
        try:
            answers = json.loads(target)
            sound = bool(answers) and all(spans and all(isinstance(s, str) for s in spans) for spans in answers)
        except (ValueError, TypeError):
            sound = False
        return None if sound else f"{target!r} is not a list of answers, each a list of texts"


def f1_of(response: str, spans: Sequence[str]) -> float:
    """F1 of one response against one answer, to two digits as the official script rounds it.

    Example: "12 field goals" against ["12"] has precision 1/3 and recall 1: 0.5.
    """
    if not spans[0].strip():
        return 0.0
    said = words(response)
    best = max(_bag_f1(said, words(span)) for span in spans)
    return round(best / len(spans), 2)


def _bag_f1(said: set[str], gold: set[str]) -> float:
    numbers = {word for word in gold if _is_number(word)}
    if numbers and not numbers & {word for word in said if _is_number(word)}:
        return 0.0
    common = len(said & gold)
    precision = common / len(said) if said else 1.0
    recall = common / len(gold) if gold else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def words(text: str) -> set[str]:
    """Words without articles and punctuation; "12", "12.0" and "12," are one number."""
    parts = (_normal(part) for part in re.split(r"[ -]", text.lower()))
    return {word for part in parts for word in part.split()}


def _normal(part: str) -> str:
    bare = part if _is_number(part) else "".join(c for c in part if c not in _PUNCTUATION)
    bare = str(float(bare)) if _is_number(bare) else bare
    return _ARTICLES.sub(" ", bare).strip()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
