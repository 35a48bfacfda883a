"""Overlap of words with a reference answer: SQuAD's token F1 (Rajpurkar et al. 2016, section 6.1)."""

import json
import re
import string
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from tulu_lightning.types import Verdict

__all__ = ["StringF1", "f1", "tokens"]

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_THOUGHT = "</think>"


def tokens(text: str) -> list[str]:
    """Lower-case words without (ASCII) punctuation and articles, as SQuAD's script splits them."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def f1(response: list[str], label: list[str]) -> float:
    """Harmonic mean of the precision and recall of the response's tokens, each counted as often as it stands there."""
    common = (Counter(response) & Counter(label)).total()
    return 2 * common / (len(response) + len(label)) if common else 0.0


@dataclass(frozen=True)
class StringF1:
    """Score is the best F1 over the labels; right only at F1 1, so that a partial score is `wrong` with credit.

    The target is one label, or several as a JSON list of strings. What stands before the last `</think>` does not
    count. Unparseable when no word is left of the response.
    """

    runs: ClassVar = "here"

    def __call__(self, response: str, target: str) -> Verdict:
        """Score in [0, 1].

        Raises:
            ValueError: no label has a word; `complaint` says so beforehand.
        """
        labels = _labels(target)
        if isinstance(labels, str):
            raise ValueError(labels)
        words = tokens(response.rsplit(_THOUGHT, 1)[-1])
        if not words:
            return Verdict("unparseable", 0.0)
        score = max(f1(words, label) for label in labels)
        return Verdict("right" if score == 1.0 else "wrong", score)

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None."""
        labels = _labels(target)
        return labels if isinstance(labels, str) else None


def _labels(target: str) -> list[list[str]] | str:
    """The labels' tokens, or what is wrong with the target."""
    texts = [target]
    if target.lstrip().startswith("["):
        try:
            texts = json.loads(target)
        except (ValueError, RecursionError):
            texts = [target]  # a label that begins with a bracket
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        return f"{target!r} is a JSON list, but not one of strings"
    labels = [tokens(text) for text in texts]
    if not all(labels):
        return f"{target!r} has a label without a word (punctuation and articles do not count)"
    return labels
