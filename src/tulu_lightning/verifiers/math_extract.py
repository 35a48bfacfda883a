r"""Where a response to a maths problem states its answer.

In order of authority: the last `\boxed` or `\fbox`, the sentence of Minerva's prompt ("Final Answer: The final answer
is X. I hope it is correct.", Lewkowycz et al. 2022, appendix D), the last formula, and a response that is nothing but
an answer. Every search is linear in the text: a response of a megabyte costs milliseconds.
"""

import re
from typing import NamedTuple

__all__ = ["Stated", "boxed", "formula", "sentence", "stated", "whole"]

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_OPENING = "Final Answer: The final answer is"
_CLOSING = "I hope it is correct"
# Backslash pairs are tokens of their own, so that an escaped dollar is money, and "\\[2pt]" a row's end.
_DELIMITER = re.compile(r"\\[\[\]()$]|\\\\|\$\$?")
_CLOSED_BY = {"$": "$", "$$": "$$", r"\(": r"\)", r"\[": r"\]"}
_LEAD = re.compile(r"answer(?:\s+is)?\s*[:=]?\s*", re.IGNORECASE)
MAX_WHOLE = 300
"""Characters of the longest response that is taken for an answer as a whole."""


class Stated(NamedTuple):
    """An answer as the response states it, and where it ends: the one that ends last is the final one."""

    text: str
    end: int


def boxed(text: str) -> Stated | None:
    r"""Content of the last `\boxed{...}` or `\fbox{...}`, braces balanced; of `\boxed 5`, the next word.

    None when there is no box, or the last one is not closed (a response that was cut off states no answer).
    """
    match = None
    for match in _BOX.finditer(text):  # noqa: B007 - only the last one is wanted
        pass
    if match is None:
        return None
    start = match.end()
    if text[start : start + 1] != "{":
        word = re.compile(r"[^\s$]*").match(text, start)
        assert word is not None, "the pattern matches the empty text"
        return Stated(word[0].rstrip(".,;"), word.end())
    depth = 0
    escaped = False
    for at in range(start, len(text)):
        character = text[at]
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return Stated(text[start + 1 : at].strip(), at)
    return None


def sentence(text: str) -> Stated | None:
    """The answer between the last "Final Answer: The final answer is" and "I hope it is correct".

    Of a sentence with one box or formula, that; of "$3$ and $5$", all of it.
    """
    start = text.rfind(_OPENING)
    if start < 0:
        return None
    start += len(_OPENING)
    end = text.find(_CLOSING, start)
    if end < 0:
        return None
    words = text[start:end].strip().removeprefix(":").strip().removesuffix(".").strip()
    if box := boxed(words):
        return Stated(box.text, end)
    outside = words.split("$")[::2]
    if len(outside) == 2 and not any(character.isdigit() for part in outside for character in part):
        return Stated(words.split("$")[1].strip(), end)
    return Stated(words, end)


def formula(text: str) -> Stated | None:
    r"""Content of the last `$...$`, `$$...$$`, `\(...\)` or `\[...\]`; an opening one without its end is skipped."""
    opened: tuple[str, int] | None = None
    found = None
    for match in _DELIMITER.finditer(text):
        token = match[0]
        if opened is not None and token == _CLOSED_BY[opened[0]]:
            found = Stated(text[opened[1] : match.start()].strip(), match.end())
            opened = None
        elif opened is None and token in _CLOSED_BY:
            opened = (token, match.end())
        elif token == "$$" and opened is not None and opened[0] == "$":  # "$a$$b$": one ends, the next begins
            found = Stated(text[opened[1] : match.start()].strip(), match.start() + 1)
            opened = ("$", match.end())
    return found


def whole(text: str) -> Stated | None:
    """The response itself when it is one short line, from behind a last "answer is" or "answer:" if it has that."""
    text = text.strip()
    if not text or len(text) > MAX_WHOLE or "\n" in text:
        return None
    for lead in _LEAD.finditer(text):
        rest = text[lead.end() :].strip()
        if rest:
            return Stated(_bare(rest), len(text))
    return Stated(_bare(text), len(text))


def stated(text: str) -> Stated | None:
    """The answer that the response ends on: of its last box and its final sentence the one that comes later.

    A box inside the sentence is the sentence's own answer. Without either, the last formula; without that, the
    whole response; None if that is no answer's length.
    """
    candidates = [found for found in (boxed(text), sentence(text)) if found and found.text]
    if candidates:
        return max(candidates, key=lambda found: found.end)
    last = formula(text)
    if last and last.text:
        return last
    return None if _BOX.search(text) else whole(text)  # a box that is empty or not closed states nothing


def _bare(text: str) -> str:
    """Without the emphasis and the full stop around an answer in plain text."""
    return text.strip().strip("*_`").removesuffix(".").strip("*_` ")
