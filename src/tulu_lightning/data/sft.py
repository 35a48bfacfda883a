"""Conversations for supervised fine-tuning."""

from tulu_lightning.core.packing import loss_weight
from tulu_lightning.data import chat
from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.packed import PackedData, segment
from tulu_lightning.data.readers import read_chat
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
        messages = read_chat(source, number, row)
        if any(message["role"] == "assistant" and not message["content"].strip() for message in messages):
            raise LeftOut("with an empty answer")
        ids, trained = chat.encode(self.tokenizer, self.template, messages)
        self._check_length(source, number, len(ids))
        return Document((segment(ids, [float(token) for token in trained]),))

    def _denominator(self, documents: list[Document]) -> float:
        return sum(map(loss_weight, documents))
