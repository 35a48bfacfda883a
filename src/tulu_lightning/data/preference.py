"""Pairs of a better and a worse answer, for DPO and reward modelling."""

from collections.abc import Sequence
from typing import Any, ClassVar

from tulu_lightning.data import chat, doctor, filters, pairs
from tulu_lightning.data.base import Overflow
from tulu_lightning.data.cache import Kept
from tulu_lightning.data.chat import Encoded, Message, Train
from tulu_lightning.data.intake import LeftOut, TooLong
from tulu_lightning.data.packed import EXAMINED, PackedData
from tulu_lightning.data.pair_formats import EQUAL, IdPair, Pair, to_pair
from tulu_lightning.data.readers import shown
from tulu_lightning.data.rows import Documents
from tulu_lightning.data.sources import PAIR_FORMATS, Row, Source, Table
from tulu_lightning.errors import InputError

__all__ = ["PreferenceData"]

HIGHEST = 2**31
"""Above any token id; Rust tokenizers take no larger number."""


class PreferenceData(PackedData):
    """Rows with a chosen and a rejected conversation, or answer to a prompt, or with token ids (`data.pair_formats`).

    Both conversations are rendered and tokenised whole, as for SFT. A document is the longest start that both have in
    common, in tokens, and its two continuations, chosen before rejected; so what is common is computed once. It ends
    each side with its last scored token. Scored tokens of the common start belong to both sides. `max_tokens` limits
    each side, the common start included; the pack holds that start once. A step's denominator is its number of pairs
    over all ranks. Pairs that teach nothing (equal, empty, tied) are left out.
    """

    formats: ClassVar[tuple[str, ...]] = PAIR_FORMATS

    def __init__(
        self,
        *,
        sources: list[Source],
        tokenizer: str,
        max_tokens: int,
        examples_per_step: int,
        micro_tokens: int = 4096,
        template: str = "chatml",
        seed: int = 0,
        epochs: int = 1,
        max_steps: int | None = None,
        on_overflow: Overflow = "drop",
        max_dropped_share: float = 0.5,
        accept_changed_data: bool = False,
        pad_to: int = 0,
        train: Train = "all",
        validation: list[Source] | None = None,
        share_prefix: bool = True,
    ) -> None:
        """Keep the settings; those not named here are as in `PackedData`.

        Args:
            sources: as in `StepData`.
            tokenizer: as in `StepData`.
            max_tokens: longest side of a pair that is kept, in tokens, template and prompt included.
            examples_per_step: pairs of one optimiser step, over all ranks.
            micro_tokens: as in `PackedData`.
            template: as in `StepData`.
            seed: as in `StepData`.
            epochs: as in `StepData`.
            max_steps: as in `StepData`.
            on_overflow: as in `StepData`; of a pair each side is cut on its own, and keeps something of what differs.
            max_dropped_share: as in `StepData`.
            accept_changed_data: as in `StepData`.
            pad_to: as in `PackedData`.
            train: which assistant turns of each side are scored: `all`, or only the `last`.
            validation: as in `PackedData`.
            share_prefix: compute once what both sides begin with. Without, only the first token is shared: the same
                numbers, for comparison.

        Raises:
            InputError: as in `PackedData`.
        """
        super().__init__(
            sources=sources,
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            examples_per_step=examples_per_step,
            micro_tokens=micro_tokens,
            template=template,
            seed=seed,
            epochs=epochs,
            max_steps=max_steps,
            on_overflow=on_overflow,
            max_dropped_share=max_dropped_share,
            accept_changed_data=accept_changed_data,
            pad_to=pad_to,
            train=train,
            validation=validation,
        )
        self.share_prefix = share_prefix

    def _token_settings(self) -> dict[str, Any]:
        return {**super()._token_settings(), "share_prefix": self.share_prefix}

    def _row(self, source: Source, number: int, row: Row) -> Pair | IdPair:
        pair = to_pair(source, number, row)
        for messages in (pair if isinstance(pair, Pair) else pair.texts) or ():
            filters.check(source, number, messages, row)
        return pair

    def _conversations(self, source: Source, table: Table) -> list[doctor.Named]:
        rows = enumerate(table.take(range(min(EXAMINED, len(table)))))
        self._check_vocabulary(source, [(table.number(index), _said(row), self._words(row)) for index, row in rows])
        return super()._conversations(source, table)

    def _check_vocabulary(self, source: Source, answers: Sequence[tuple[int, str | None, str | None]]) -> None:
        """Refuse token ids of another tokenizer, where texts stand beside them.

        A text may have been edited since. That no row's ids say what its text says takes another vocabulary.

        Args:
            source: where the rows are from.
            answers: number of a row, its chosen answer, and what its ids say; None for what is not there.
        """
        both = [(number, text, words) for number, text, words in answers if text is not None and words is not None]
        if not both or any(text == words for _, text, words in both):
            return
        number, text, words = both[0]
        what = f"chosen is {shown(text)}, and chosen_ids are {shown(words)} by the tokenizer of {self._tokenizer_path}"
        remedy = (
            "Train the model whose ids they are, or remove prompt_ids, chosen_ids and rejected_ids: the texts are then "
            "read."
        )
        raise InputError(source.row_name(number), what, remedy)

    def _words(self, row: Row) -> str | None:
        """A row's chosen answer by its token ids, as a reader sees it; None where there are none."""
        ids = row.get("chosen_ids")
        if not isinstance(ids, list) or not all(type(item) is int and 0 <= item < HIGHEST for item in ids):
            return None  # reading the row says what is wrong
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()

    def _examined(self, row: Pair | IdPair) -> Sequence[Message] | None:
        return row.chosen if isinstance(row, Pair) else None

    def _encode(
        self, source: Source, numbers: Sequence[int], rows: Sequence[Pair | IdPair | LeftOut]
    ) -> list[Kept | LeftOut]:
        conversations = [messages for row in rows if isinstance(row, Pair) for messages in row]
        encoded = iter(chat.encode_many(self.tokenizer, self.template, conversations, self.train))
        stops = self.stop_ids
        outcomes: list[Kept | LeftOut] = []
        for number, row in zip(numbers, rows, strict=True):
            if isinstance(row, LeftOut):
                outcomes.append(row)
            elif isinstance(row, IdPair):
                sides = (_encoded(row.prompt, answer, stops) for answer in (row.chosen, row.rejected))
                outcomes.append(self._fitted(source, number, *sides))
            else:
                outcomes.append(self._fitted(source, number, *map(pairs.without_tail, (next(encoded), next(encoded)))))
        return outcomes

    def _fitted(self, source: Source, number: int, chosen: Encoded, rejected: Encoded) -> Kept | LeftOut:
        if not chosen.ids or not rejected.ids:
            return LeftOut("without a scored token")
        if chosen.ids == rejected.ids:
            return LeftOut(EQUAL)
        shared = pairs.common_start(chosen, rejected)
        assert shared, "the doctor's rule `prefix` says that a template writes the same start for both sides"
        longest = max(len(chosen.ids), len(rejected.ids))
        if longest > self.max_tokens and self.on_overflow == "truncate":
            cut = [pairs.cut(side, shared, self.max_tokens) for side in (chosen, rejected)]
            if cut[0] is None or cut[1] is None:
                return TooLong(f"cut to nothing at {self.max_tokens} tokens")
            chosen, rejected = cut[0], cut[1]
            if chosen.ids == rejected.ids:
                return TooLong(f"equal when cut at {self.max_tokens} tokens")
            shared = pairs.common_start(chosen, rejected)
        elif reason := self._too_long(source, number, longest):
            return reason
        kept = pairs.parts(chosen, rejected, shared if self.share_prefix else 1)
        return Kept(kept, truncated=longest > self.max_tokens)

    def _denominator(self, documents: Documents, rows: Sequence[int]) -> float:
        return float(len(rows))


def _said(row: Row) -> str | None:
    text = row.get("chosen")
    return text.strip() if isinstance(text, str) else None


def _encoded(prompt: list[int], answer: list[int], stops: Sequence[int]) -> Encoded:
    """One side of a pair of token ids; an answer that a sampler cut has no end."""
    ends = (len(prompt) + len(answer),) if answer[-1] in stops else ()
    return Encoded(prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer), ends)
