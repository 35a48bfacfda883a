"""Pairs of a better and a worse answer, for DPO and reward modelling."""

from collections.abc import Sequence

from tulu_lightning.data import chat
from tulu_lightning.data.cache import Kept
from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.packed import PackedData
from tulu_lightning.data.readers import read_preference
from tulu_lightning.data.rows import Documents
from tulu_lightning.data.sources import Row, Source
from tulu_lightning.data.store import Part

__all__ = ["PreferenceData"]


class PreferenceData(PackedData):
    """Rows with `prompt`, `chosen` and `rejected`, or with their token ids.

    A document is the prompt (context only) and its two continuations, chosen before rejected, so the prompt is
    computed once. `max_tokens` limits the prompt with the longer answer; the pack holds prompt, chosen and rejected.
    A step's denominator is its number of pairs over all ranks. Pairs with an empty or two equal answers are left out.
    """

    def _encode(self, source: Source, numbers: Sequence[int], rows: Sequence[Row]) -> list[Kept | LeftOut]:
        return [self._pair(source, number, row) for number, row in zip(numbers, rows, strict=True)]

    def _pair(self, source: Source, number: int, row: Row) -> Kept | LeftOut:
        try:
            prompt, chosen, rejected = self._ids(source, number, row)
        except LeftOut as reason:
            return reason.with_traceback(None)
        if not chosen or not rejected:
            return LeftOut("with an empty answer")
        if chosen == rejected:
            return LeftOut("with equal answers")
        if reason := self._too_long(source, number, len(prompt) + max(len(chosen), len(rejected))):
            return reason
        return Kept(
            (
                Part(prompt, [0.0] * len(prompt)),
                Part(chosen, [1.0] * len(chosen), parent=0),
                Part(rejected, [1.0] * len(rejected), parent=0),
            )
        )

    def _ids(self, source: Source, number: int, raw: Row) -> tuple[list[int], list[int], list[int]]:
        row = read_preference(source, number, raw)
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

    def _denominator(self, documents: Documents, rows: Sequence[int]) -> float:
        return float(len(rows))
