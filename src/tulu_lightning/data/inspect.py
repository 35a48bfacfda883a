"""A tokenised row for people to read: the text as the model sees it, with what is trained marked.

Everything is decoded from the token ids and the loss weights that training uses; nothing is rendered a second time.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from tulu_lightning.types import Document, Segment

__all__ = ["Run", "runs", "shown"]

TRAINED, REJECTED, CONTEXT, NOTE = "bold green", "bold red", "dim", "cyan"
LABELS = {1: ("",), 3: ("shared start", "chosen", "rejected")}
"""Names of a document's segments, by how many there are."""
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
"""Control characters and their pictures (␍ for a carriage return), since a terminal would drop or obey them."""
OPEN, CLOSE = "⟦", "⟧"
"""Around trained text where there is no colour."""


class Run(NamedTuple):
    """Neighbouring tokens of one loss weight."""

    text: str
    ids: tuple[int, ...]
    weight: float
    """0: context only."""


def runs(tokenizer: PreTrainedTokenizerBase, segment: Segment) -> Iterator[Run]:
    """A segment's tokens by loss weight, in order; the texts, joined, are what the ids decode to.

    The first token of a document is context, whatever its weight: nothing stands before it that could predict it.
    A character whose bytes lie on both sides of a border shows as a replacement character on each.
    """
    weights = segment.weights_L.tolist()
    if segment.parent < 0:
        weights[:1] = [0.0]
    pairs = zip(segment.ids_L.tolist(), weights, strict=True)
    for weight, group in groupby(pairs, key=lambda pair: pair[1]):
        ids = tuple(token for token, _ in group)
        yield Run(_decode(tokenizer, ids), ids, weight)


def shown(tokenizer: PreTrainedTokenizerBase, document: Document, ids: bool = False, colour: bool = True) -> Text:
    """A document as coloured text: trained tokens bold and green (of a rejected side red), context dim.

    Args:
        tokenizer: the run's.
        document: a row.
        ids: put each token's id behind it.
        colour: whether the terminal has colours; without, trained text stands between ⟦ and ⟧.

    Returns:
        One text; what both sides of a pair begin with and the rest of each have headings.
    """
    text = Text()
    labels = LABELS.get(len(document.segments), tuple(f"segment {i}" for i in range(len(document.segments))))
    for label, segment in zip(labels, document.segments, strict=True):
        if label:
            text.append(f"{'' if not text else chr(10)}[{label}]\n", style=NOTE)
        for run in runs(tokenizer, segment):
            style = CONTEXT if not run.weight else REJECTED if label == "rejected" else TRAINED
            _append(text, tokenizer, run, ids, style if colour else "")
    return text


def _append(text: Text, tokenizer: PreTrainedTokenizerBase, run: Run, ids: bool, style: str) -> None:
    """Without a style there are no colours, and brackets take their place."""
    note = NOTE if style else ""
    bracketed = run.weight > 0 and not style
    if bracketed:
        text.append(OPEN)
    if not ids:
        text.append(run.text.translate(PICTURES), style=style)
    else:
        for token in run.ids:
            text.append(_decode(tokenizer, (token,)).translate(PICTURES), style=style)
            text.append(f"⟨{token}⟩", style=note)
    if bracketed:
        text.append(CLOSE)
    if run.weight not in (0, 1):
        text.append(f"×{run.weight:g}", style=note)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    decoded = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(decoded, str)
    return decoded
