"""Conversations for supervised fine-tuning."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from tulu_lightning.core.step_plan import StepPlan
from tulu_lightning.data import chat, doctor, filters
from tulu_lightning.data.base import Overflow, Steps
from tulu_lightning.data.cache import Kept
from tulu_lightning.data.chat import Encoded, Message, Train
from tulu_lightning.data.formats import to_messages
from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.loader import StepLoader
from tulu_lightning.data.packed import PackedData
from tulu_lightning.data.rows import Documents
from tulu_lightning.data.sources import Row, Source, Table
from tulu_lightning.data.store import Part
from tulu_lightning.errors import InputError
from tulu_lightning.types import StepBatch

__all__ = ["SFTData", "Train"]

EXAMINED = 50
"""Rows of each source that the template doctor looks at."""


class SFTData(PackedData):
    """Conversations; every assistant turn is trained, with the token that ends it.

    A step's denominator is the number of its trained tokens over all ranks (the sum of their weights), so every trained
    token of a step counts the same, whichever row and rank it is on. A row without one is left out.

    Example:
        `SFTData(sources=[Source("chat", path="chat.jsonl")], tokenizer="smollm2-135m-instruct", max_tokens=512,
        examples_per_step=16)`
    """

    truncates: ClassVar[bool] = True

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
    ) -> None:
        """Keep the settings; those not named here are as in `PackedData`.

        Args:
            sources: as in `StepData`.
            tokenizer: as in `StepData`.
            max_tokens: as in `StepData`.
            examples_per_step: as in `StepData`.
            micro_tokens: as in `PackedData`.
            template: as in `StepData`.
            seed: as in `StepData`.
            epochs: as in `StepData`.
            max_steps: as in `StepData`.
            on_overflow: as in `StepData`.
            max_dropped_share: as in `StepData`.
            accept_changed_data: as in `StepData`.
            pad_to: as in `PackedData`.
            train: which assistant turns are trained: `all`, or only the `last` of each conversation.
            validation: rows that are not trained on: their loss is logged as `val_loss` (`tulu validate`, and in a fit
                whenever the trainer validates).

        Raises:
            InputError: a number below 1, an unknown `train`, an empty `validation`, or what `StepData` refuses.
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
        )
        if train not in ("all", "last"):
            raise InputError("data.train", f"is {train!r}", "Use 'all' or 'last'.")
        if validation == []:
            raise InputError("data.validation", "there is no source", "Give at least one, or leave it out.")
        self.train: Train = train
        self.validation = validation
        self._validation: Documents | None = None
        if validation is not None:  # Lightning, and `tulu validate`, go by whether the hook is there
            self.val_dataloader = self._val_dataloader

    # Reading ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str = "fit") -> None:
        """As in `StepData`; the validation rows, too."""
        super().setup(stage)
        if self.validation is not None and self._validation is None:
            mixed = self._mix(self.validation, "data.validation")
            assert isinstance(mixed, Documents)
            self._validation = mixed

    def _token_settings(self) -> dict[str, Any]:
        return {**super()._token_settings(), "train": self.train}

    def _read(self, source: Source, numbers: Sequence[int], rows: Sequence[Row]) -> list[list[Message] | LeftOut]:
        return [self._messages(source, number, row) for number, row in zip(numbers, rows, strict=True)]

    def _encode(
        self, source: Source, numbers: Sequence[int], rows: Sequence[list[Message] | LeftOut]
    ) -> list[Kept | LeftOut]:
        conversations = [messages for messages in rows if not isinstance(messages, LeftOut)]
        encoded = iter(chat.encode_many(self.tokenizer, self.template, conversations, self.train))
        return [
            messages if isinstance(messages, LeftOut) else self._fitted(source, number, next(encoded))
            for number, messages in zip(numbers, rows, strict=True)
        ]

    def _conversations(self, source: Source, table: Table) -> list[doctor.Named]:
        indices = range(min(EXAMINED, len(table)))
        numbers = [table.number(index) for index in indices]
        return [
            (source.row_name(number), messages)
            for number, messages in zip(numbers, self._read(source, numbers, table.take(indices)), strict=True)
            if not isinstance(messages, LeftOut) and messages[0]["role"] != chat.PLAIN
        ]

    def _messages(self, source: Source, number: int, row: Row) -> list[Message] | LeftOut:
        try:
            messages = to_messages(source, number, row)
            filters.check(source, messages, row)
        except LeftOut as reason:
            return reason.with_traceback(None)
        return messages

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

    # Steps ------------------------------------------------------------------------------------------------------

    @property
    def validation_documents(self) -> Documents | None:
        """The rows of `validation`, tokenised."""
        self.setup()
        return self._validation

    @property
    def document_sets(self) -> tuple[Documents, ...]:
        """The training rows and those of `validation`."""
        held_out = self.validation_documents
        return (self.documents,) if held_out is None else (self.documents, held_out)

    def _val_dataloader(self) -> StepLoader:
        """Every validation row once, as batches like those of training."""
        documents = self.validation_documents
        assert documents is not None
        rank, world_size = self._place()
        plan = StepPlan(
            lengths=torch.from_numpy(documents.lengths),
            examples_per_step=min(self.examples_per_step, len(documents)),
            micro_tokens=self.micro_tokens,
            world_size=world_size,
            pad_to=self.pad_to,
        )

        def batch(plan: StepPlan, step: int, rank: int) -> StepBatch:
            return self._batch(documents, plan, step, rank)

        return StepLoader(Steps(batch, plan, rank), plan.total_steps)

    def _denominator(self, documents: Documents, rows: Sequence[int]) -> float:
        return float(documents.weight_sums[list(rows)].sum())
