"""What constraints count in a text: words, sentences, its language. nltk and langdetect are imported on first use."""

import functools
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["brackets", "language", "missing_data", "relaxed", "sentences", "tokens", "words"]

DATA_HOLDER = "llama-index-core"
"""A distribution that ships nltk's tokenizer data; used where it happens to be installed."""


def relaxed(response: str) -> Iterator[str]:
    """The eight readings of the loose judgement (Zhou et al. 2023, section 2.2): as it is first.

    An opening or closing line ("Sure, here it is:") is taken off, or both, each with and without asterisks. A short
    response leaves some of them blank; those are left out.
    """
    lines = response.split("\n")
    cut = (lines[1:], lines[:-1], lines[1:-1])
    for reading in (response, *("\n".join(kept).strip() for kept in cut)):
        if reading.strip():
            yield reading
        if (plain := reading.replace("*", "")).strip() and plain != reading:
            yield plain


def words(text: str) -> int:
    """Number of runs of letters, digits and underscores."""
    return len(re.findall(r"\w+", text))


def brackets(text: str) -> list[str]:
    """What stands in square brackets, each within one line; linear in the text, which a lazy pattern is not."""
    found = []
    for line in text.split("\n"):
        start = line.find("[")
        while start >= 0 and (end := line.find("]", start)) >= 0:
            found.append(line[start + 1 : end])
            start = line.find("[", end)
    return found


def language(text: str) -> str | None:
    """The language that langdetect sees (its code, e.g. `en` or `zh-cn`), or None where it sees nothing to go by.

    Always the same for one text: its random draws are seeded, for the whole process.
    """
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text)
    except langdetect.LangDetectException:
        return None


def sentences(text: str) -> int:
    """Number of sentences by nltk's English Punkt model; `missing_data` tells beforehand whether it is there."""
    return len(_punkt().tokenize(text))


def tokens(text: str) -> list[str]:
    """Words and punctuation marks by nltk's Treebank rules, sentence by sentence; hyphenated words stay whole."""
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer = _treebank(NLTKWordTokenizer)
    return [token for sentence in _punkt().tokenize(text) for token in tokenizer.tokenize(sentence)]


def missing_data() -> str | None:
    """What is missing for `sentences` and `tokens` and how to get it, or None."""
    try:
        _punkt()
    except LookupError:
        return (
            "nltk's data punkt_tab are not on this machine: run `python -m nltk.downloader punkt_tab`, "
            "or set NLTK_DATA to the folder that holds tokenizers/punkt_tab"
        )
    return None


@functools.cache
def _punkt() -> Any:
    import nltk
    from nltk.tokenize.punkt import PunktTokenizer

    try:
        return PunktTokenizer("english")
    except LookupError:
        if (folder := _data_folder()) is None:
            raise
        nltk.data.path.append(folder)
        return PunktTokenizer("english")


@functools.cache
def _treebank(kind: Any) -> Any:
    return kind()


def _data_folder() -> str | None:
    """The nltk data inside a package that is installed, found without importing it."""
    from importlib import metadata  # twice as slow to import as all the rest of this

    try:
        distribution = metadata.distribution(DATA_HOLDER)
    except metadata.PackageNotFoundError:
        return None
    return str(distribution.locate_file("llama_index/core/_static/nltk_cache"))
