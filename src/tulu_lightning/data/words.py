"""Token ids of European text by looking up its words: what a byte-level BPE tokenizer does, without its costs.

Such a tokenizer cuts text into words by a regular expression and merges bytes within each word, so a word has the same
ids wherever it stands. Chat text uses few different words again and again. They are cut here by Python's `re`, and each
is given to the tokenizer once. Text with other letters than `COMMON` is left to the tokenizer, whose tables of letters
may be of another Unicode version. A tokenizer whose way of cutting is not known here, or that fails the trial, gets no
table.
"""

import json
import re
from collections.abc import Iterable
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import models, normalizers
from transformers import PreTrainedTokenizerBase

__all__ = ["WordTable", "word_table"]

LIMIT = 1 << 18  # words that are kept
LETTERS, NUMBERS = "A-Za-zªµºÀ-ÖØ-öø-ÿ", "0-9²³¹¼-¾"  # \p{L} and \p{N} within COMMON
COMMON = re.compile("[\0-\x7f¡-ÿ‐-•…€™]*")  # ASCII, Latin-1 but for its white space, dashes, quotation marks
CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
GPT2 = rf"{CONTRACTIONS}| ?[{LETTERS}]+| ?[{NUMBERS}]+| ?[^\s{LETTERS}{NUMBERS}]+|\s+(?!\S)|\s+"
GPT2_DIGITS = rf"{CONTRACTIONS}| ?[{LETTERS}]+|[{NUMBERS}]| ?[^\s{LETTERS}{NUMBERS}]+|\s+(?![^\s{NUMBERS}])|\s+"
"""After each digit has been cut off: white space before a digit is at the end of its part of the text."""

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
TRIAL = (
    "don't I'LL we'Ve 'S 's 1234567 1,000.5e-3 ___ --> x\n\n\n  y \t z\r\n\r\n 5  6\n7 \n8",
    "def f(x):\n\treturn {x: [1, 2]}  # ok\n\n\n    end   ",
    " \n \n\n a  b   c    \n",
    "".join(chr(at) for at in range(256) if COMMON.fullmatch(chr(at))),
    " ".join(f"a{mark}1 {mark}b2{mark}{mark} {mark}" for mark in map(chr, range(0x2123)) if COMMON.fullmatch(mark)),
    "".join(a + b + "  " + b + "\n" + a for a in " \n\ta5'!" for b in " \n\rZ0_#"),
)
"""Every kind of border between words; the table must give what the tokenizer gives."""


class WordTable:
    """Ids by word, filled as words come up.

    Args:
        backend: the Rust tokenizer, set to take special tokens as text.
        pattern: how it cuts common text.
        added: texts that the tokenizer takes out before it cuts.
    """

    def __init__(self, backend: Any, pattern: str, added: Iterable[str]) -> None:
        self._backend = backend
        self._words = re.compile(pattern, re.ASCII)
        self._added = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        self._ids: dict[str, list[int]] = {}

    def encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Ids of those of the texts that can be looked up."""
        if len(self._ids) > LIMIT:
            self._ids.clear()
        cut: dict[str, list[str]] = {}
        for text in texts:
            if (text.isascii() or COMMON.fullmatch(text)) and not self._added.search(text):
                words = self._words.findall(text)
                if sum(map(len, words)) == len(text):  # nothing lies between the words
                    cut[text] = words
        for word in set(chain.from_iterable(cut.values())).difference(self._ids):
            # One by one: in a batch, each word would take four times as long as a call does.
            self._ids[word] = self._backend.encode(word, add_special_tokens=False).ids
        ids = self._ids.__getitem__
        return {text: list(chain.from_iterable(map(ids, words))) for text, words in cut.items()}


_TABLES: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, WordTable | None]] = WeakKeyDictionary()


def word_table(tokenizer: PreTrainedTokenizerBase) -> WordTable | None:
    """The table of a Rust tokenizer that is set to take special tokens as text; None where words cannot be looked up.

    It is kept with the tokenizer, and made anew when something is added to it or its way of cutting changes.
    """
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    cutting = backend.pre_tokenizer and backend.pre_tokenizer.__getstate__()
    state = (backend, cutting, type(backend.normalizer), len(tokenizer))
    if tokenizer not in _TABLES or _TABLES[tokenizer][0] != state:
        _TABLES[tokenizer] = (state, _make(tokenizer, backend))
    return _TABLES[tokenizer][1]


def _make(tokenizer: PreTrainedTokenizerBase, backend: Any) -> WordTable | None:
    plain = isinstance(backend.model, models.BPE) and not backend.model.dropout
    if not plain or not (backend.normalizer is None or isinstance(backend.normalizer, normalizers.NFC)):
        return None
    pattern = _pattern(backend)
    if pattern is None:
        return None
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    table = WordTable(backend, pattern, added)
    found = table.encode(TRIAL)
    tried = {text: backend.encode(text, add_special_tokens=False).ids for text in found}
    return table if found and found == tried else None


def _pattern(backend: Any) -> str | None:
    """How the tokenizer cuts common text, if that is one of the ways known here."""
    if backend.pre_tokenizer is None:
        return None
    state: dict[str, Any] = json.loads(backend.pre_tokenizer.__getstate__())
    parts = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    *before, last = parts
    if not BYTE_LEVEL.items() <= last.items() or len(before) > 1:
        return None
    if not before:
        return GPT2 if last["use_regex"] else None
    (first,) = before
    if first == {"type": "Digits", "individual_digits": True} and last["use_regex"]:
        return GPT2_DIGITS
    splits = first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"]
    if splits and not last["use_regex"] and "Regex" in first["pattern"]:
        return _narrowed(first["pattern"]["Regex"])
    return None


def _narrowed(pattern: str) -> str | None:
    """A pattern for Unicode text narrowed to common text; None if it has other classes than letters and numbers."""
    depth = 0
    parts = []
    for token in re.findall(r"\\p\{[LN]\}|\\[srn]|\\S|\\.|.", pattern, re.DOTALL):
        depth += (token == "[") - (token == "]")
        if token in (r"\p{L}", r"\p{N}"):
            letters = LETTERS if token == r"\p{L}" else NUMBERS
            parts.append(letters if depth else f"[{letters}]")
        elif token.startswith("\\") and token[1] not in "srnS":
            return None
        else:
            parts.append(token)
    return "".join(parts)
