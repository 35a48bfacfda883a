"""Pairs of a better and a worse answer, for DPO and reward modelling."""

from tulu_lightning.data import chat
from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.packed import PackedData, segment
from tulu_lightning.data.readers import PreferenceRow, read_preference
from tulu_lightning.data.sources import Row, Source
from tulu_lightning.types import Document

__all__ = ["PreferenceData"]


class PreferenceData(PackedData):
    """Rows with `prompt`, `chosen` and `rejected`, or with their token ids.

    A document is the prompt (context only) and its two continuations, chosen before rejected, so the prompt is
    computed once. `max_tokens` limits the prompt with the longer answer; the pack holds prompt, chosen and rejected.
    A step's denominator is its number of pairs over all ranks. Pairs with an empty or two equal answers are left out.
    """

    def _read(self, source: Source, number: int, row: Row) -> Document:
        prompt, chosen, rejected = self._ids(read_preference(source, number, row))
        if not chosen or not rejected:
            raise LeftOut("with an empty answer")
        if chosen == rejected:
            raise LeftOut("with equal answers")
        self._check_length(source, number, len(prompt) + max(len(chosen), len(rejected)))
        return Document(
            (
                segment(prompt, [0.0] * len(prompt)),
                segment(chosen, [1.0] * len(chosen), parent=0),
                segment(rejected, [1.0] * len(rejected), parent=0),
            )
        )

    def _ids(self, row: PreferenceRow) -> tuple[list[int], list[int], list[int]]:
        if row.ids is not None:
            prompt, chosen, rejected = map(list, row.ids)
            return prompt, chosen, rejected
        if not row.chosen.strip() or not row.rejected.strip():
            raise LeftOut("with an empty answer")
        prompt, _ = chat.encode(self.tokenizer, self.template, row.prompt, generation_prompt=True)
        chosen, rejected = (
            chat.encode_answer(self.tokenizer, self.template, text) for text in (row.chosen, row.rejected)
        )
        return prompt, chosen, rejected

    def _denominator(self, documents: list[Document]) -> float:
        return float(len(documents))
