"""Conversations for supervised fine-tuning."""

from tulu_lightning.core.packing import loss_weight
from tulu_lightning.data import chat, filters
from tulu_lightning.data.formats import to_messages
from tulu_lightning.data.packed import PackedData, segment
from tulu_lightning.data.sources import Row, Source
from tulu_lightning.types import Document

__all__ = ["SFTData"]


class SFTData(PackedData):
    """Rows with `messages`; every assistant turn is trained, with the token that ends it.

    A step's denominator is the number of its trained tokens over all ranks, so every trained token of a step counts
    the same, whichever row and rank it is on.

    Example:
        `SFTData(sources=[Source("chat", path="chat.jsonl")], tokenizer="smollm2-135m-instruct", max_tokens=512,
        examples_per_step=16)`
    """

    def _read(self, source: Source, number: int, row: Row) -> Document:
        messages = to_messages(source, number, row)
        filters.check(source, messages, row)
        ids, trained = chat.encode(self.tokenizer, self.template, messages)
        self._check_length(source, number, len(ids))
        return Document((segment(ids, [float(token) for token in trained]),))

    def _denominator(self, documents: list[Document]) -> float:
        return sum(map(loss_weight, documents))
