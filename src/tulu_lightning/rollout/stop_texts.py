"""Texts that end a sample. Token ids cannot: one text is many runs of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tulu_lightning.errors import InputError

if TYPE_CHECKING:  # scoring reads tokens with this, and `tulu verify` starts in a tenth of the time without these
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = ["EVERY", "StopTexts", "ended", "text_of"]

EVERY = 8
"""Tokens of a row between two looks at its text by our own engine: reading text costs more than drawing a token."""


class StopTexts:
    """A sample ends with the token that completes one of these texts, which stays in it.

    Args:
        texts: none of them empty.
        tokenizer: of the model; special tokens are no text.

    Raises:
        InputError: an empty text, which every sample begins with.
    """

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.texts = tuple(dict.fromkeys(texts))
        if not all(self.texts):
            raise InputError("stop_texts", "one of them is empty", "Leave it out.")
        self._tokenizer = tokenizer
        self._reach = max(map(len, self.texts), default=0)

    def end(self, ids: Sequence[int], seen: int = 0) -> int | None:
        """How many tokens the sample has when it ends; None where no text is complete yet.

        Args:
            ids: the sample so far.
            seen: tokens of it after which no text was complete.
        """
        # A token that is text is a character or more, so what the new ones complete begins not far before them.
        window = ids[max(0, seen - self._reach) :]
        if seen >= len(ids) or not self._has(window):
            return None
        return next((count for count in range(seen + 1, len(ids) + 1) if self._has(ids[:count])), None)

    def _has(self, ids: Sequence[int]) -> bool:
        decoded = text_of(ids, self._tokenizer)
        return any(text in decoded for text in self.texts)


def text_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Tokens as a reader sees them: without special tokens, white space untouched."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def ended(stop_texts: StopTexts | None, ids_BL: Tensor, length_B: Tensor, done_B: Tensor) -> dict[int, int]:
    """Rows whose text ends them, with the tokens that they then have.

    Looks at a row's text when it has a multiple of `EVERY` tokens, and when it ends anyway, so that where it ends does not depend
    on how often one looks.

    Args:
        stop_texts: none ends nothing.
        ids_BL: int64, tokens of each row; what lies behind its length is not read.
        length_B: int64, tokens that each row has.
        done_B: bool, rows that end with their newest token.
    """
    if stop_texts is None:
        return {}
    found = {}
    for i in (done_B | (length_B % EVERY == 0)).nonzero()[:, 0].tolist():
        length = int(length_B[i])
        end = stop_texts.end(ids_BL[i, :length].tolist(), (length - 1) // EVERY * EVERY)
        if end is not None:
            found[i] = end
    return found
