"""Conversations for supervised fine-tuning."""

from collections.abc import Iterator

from tulu_lightning.core.packing import loss_weight
from tulu_lightning.data import chat
from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.packed import PackedData, segment
from tulu_lightning.data.readers import read_chat
from tulu_lightning.data.sources import Row, Source
from tulu_lightning.types import Document

__all__ = ["SFTData"]

EXAMINED = 50  # rows of each source that the template doctor looks at


class SFTData(PackedData):
    """Rows with `messages`; every assistant turn is trained, with the token that ends it.

    An assistant message may have a `weight`, the loss weight of its tokens (1 if left out), or `train: false`, which
    is the weight 0. A step's denominator is the summed weight of its tokens over all ranks (without weights in the
    rows, their number), so every trained token of a step counts the same, whichever row and rank it is on.

    Example:
        `SFTData(sources=[Source("chat", path="chat.jsonl")], tokenizer="smollm2-135m-instruct", max_tokens=512,
        examples_per_step=16)`
    """

    def _read(self, source: Source, number: int, row: Row) -> Document:
        messages = read_chat(source, number, row)
        if any(message["role"] == "assistant" and not message["content"].strip() for message in messages):
            raise LeftOut("with an empty answer")
        (encoded,) = chat.encode_many(self.tokenizer, self.template, [messages])
        if not any(encoded.weights):
            raise LeftOut("with nothing to train")
        self._check_length(source, number, len(encoded.ids))
        return Document((segment(encoded.ids, encoded.weights),))

    def _conversations(self, rows: dict[str, list[Row]]) -> Iterator[tuple[str, list[chat.Message]]]:
        for source in self.sources:
            for number, row in enumerate(rows[source.name][:EXAMINED], start=1):
                yield source.row_name(number), read_chat(source, number, row)

    def _denominator(self, documents: list[Document]) -> float:
        return sum(map(loss_weight, documents))
