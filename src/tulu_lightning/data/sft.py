"""Conversations for supervised fine-tuning."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from tulu_lightning.data import chat, filters
from tulu_lightning.data.cache import Kept
from tulu_lightning.data.chat import Encoded, Message, Train
from tulu_lightning.data.formats import to_messages
from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.packed import PackedData
from tulu_lightning.data.rows import Documents
from tulu_lightning.data.sources import SFT_FORMATS, Row, Source
from tulu_lightning.data.store import Part

__all__ = ["SFTData", "Train"]


class SFTData(PackedData):
    """Conversations; every assistant turn is trained, with the token that ends it.

    A step's denominator is the number of its trained tokens over all ranks (the sum of their weights), so every trained
    token of a step counts the same, whichever row and rank it is on. A row without one is left out.

    Example:
        `SFTData(sources=[Source("chat", path="chat.jsonl")], tokenizer="smollm2-135m-instruct", max_tokens=512,
        examples_per_step=16)`
    """

    formats: ClassVar[tuple[str, ...]] = SFT_FORMATS

    def _row(self, source: Source, number: int, row: Row) -> list[Message]:
        messages = to_messages(source, number, row)
        filters.check(source, number, messages, row)
        return messages

    def _examined(self, row: Sequence[Message]) -> Sequence[Message] | None:
        return None if row[0]["role"] == chat.PLAIN else row

    def _encode(
        self, source: Source, numbers: Sequence[int], rows: Sequence[list[Message] | LeftOut]
    ) -> list[Kept | LeftOut]:
        conversations = [messages for messages in rows if not isinstance(messages, LeftOut)]
        encoded = iter(chat.encode_many(self.tokenizer, self.template, conversations, self.train))
        return [
            messages if isinstance(messages, LeftOut) else self._fitted(source, number, next(encoded))
            for number, messages in zip(numbers, rows, strict=True)
        ]

    def _fitted(self, source: Source, number: int, encoded: Encoded) -> Kept | LeftOut:
        tokens = len(encoded.ids)
        cut = chat.truncate(encoded, self.max_tokens) if self.on_overflow == "truncate" else encoded
        if cut is None or len(cut.ids) > self.max_tokens:
            reason = self._too_long(source, number, tokens)
            assert reason is not None
            return reason
        # What no hidden state comes before is not predicted; what fp32 rounds to nothing does not count, either.
        if not np.float32(max(cut.weights[1:], default=0.0)) > 0:
            return LeftOut("without a trained token")
        return Kept((Part(cut.ids, cut.weights),), truncated=len(cut.ids) < tokens)

    def _denominator(self, documents: Documents, rows: Sequence[int]) -> float:
        return float(documents.weight_sums[list(rows)].sum())
