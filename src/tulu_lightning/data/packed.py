"""Steps made of packs: the base of the data modules for SFT and preferences."""

from collections.abc import Iterator, Sequence

import torch

from tulu_lightning.core.packing import filler, length, pack, scored_tokens
from tulu_lightning.core.step_plan import StepPlan
from tulu_lightning.data.base import Overflow, StepData
from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError
from tulu_lightning.types import Document, Pack, Segment, StepBatch

__all__ = ["PackedData", "segment"]


class PackedData(StepData[Document]):
    """Base of the data modules whose steps are packs of documents (SFT, preferences)."""

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
        pad_to: int = 0,
    ) -> None:
        """Keep the settings; those not named here are as in `StepData`.

        Args:
            sources: as in `StepData`.
            tokenizer: as in `StepData`.
            max_tokens: as in `StepData`.
            examples_per_step: as in `StepData`.
            micro_tokens: tokens of one forward pass on one rank; sets memory and speed, never the gradient. A row
                that is longer gets a pass of its own.
            template: as in `StepData`.
            seed: as in `StepData`.
            epochs: as in `StepData`.
            max_steps: as in `StepData`.
            on_overflow: as in `StepData`.
            pad_to: fill packs and pad them to a multiple of so many tokens, for a compiled model that wants few
                shapes (`micro_tokens` itself makes it one); 0 = no padding. Never seen in the gradient.

        Raises:
            InputError: a number below 1, an unknown `on_overflow`, or a `pad_to` that does not divide `micro_tokens`.
        """
        super().__init__(
            sources=sources,
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            examples_per_step=examples_per_step,
            template=template,
            seed=seed,
            epochs=epochs,
            max_steps=max_steps,
            on_overflow=on_overflow,
        )
        self._check_counts({"micro_tokens": micro_tokens})
        if pad_to < 0 or (pad_to and micro_tokens % pad_to):
            remedy = f"Use 0 for no padding, or a divisor of micro_tokens, which is {micro_tokens}."
            raise InputError("data.pad_to", f"is {pad_to}", remedy)
        self.micro_tokens = self._micro_tokens = micro_tokens
        self.pad_to = self._pad_to = pad_to

    @property
    def documents(self) -> Sequence[Document]:
        """The kept rows, tokenised."""
        self.setup()
        return self._items

    def packs(self, rows: Sequence[int], micro_tokens: int) -> Iterator[Pack]:
        """The given rows as packs of at most `micro_tokens` tokens, the longest rows first (out of order, then).

        For passes over the data that are not training, such as the reference's log-probs.
        """
        self.setup()
        group: list[int] = []
        size = 0
        for row in sorted(rows, key=lambda row: (-length(self._items[row]), row)):
            tokens = length(self._items[row])
            if group and size + tokens > micro_tokens:
                yield self._pack(group)
                group, size = [], 0
            group.append(row)
            size += tokens
        if group:
            yield self._pack(group)

    def _pack(self, rows: Sequence[int]) -> Pack:
        return pack([self._items[row] for row in rows], rows, self.pad_to, self._pad_id)

    @property
    def _pad_id(self) -> int:
        """Any token of the vocabulary would do: nobody reads what comes of it."""
        pad_id = self.tokenizer.pad_token_id
        return pad_id if isinstance(pad_id, int) else 0

    def _tokens(self, item: Document) -> int:
        return length(item)

    def _trained(self, item: Document) -> int:
        return scored_tokens(item)

    def _denominator(self, documents: list[Document]) -> float:
        """What the summed loss of a whole step is divided by."""
        raise NotImplementedError

    def _step_batch(self, plan: StepPlan, step: int, rank: int) -> StepBatch:
        rows = plan.examples(step)
        documents = [self._items[row] for row in rows]
        packs = tuple(
            self._pack(micro) if micro else filler(min(documents, key=length), self.pad_to, self._pad_id)
            for micro in plan.micro_batches(step, rank)
        )
        return StepBatch(step, packs, self._denominator(documents), rows)


def segment(ids: Sequence[int], weights: Sequence[float], parent: int = -1) -> Segment:
    """A segment from plain numbers."""
    return Segment(torch.tensor(ids, dtype=torch.int64), torch.tensor(weights, dtype=torch.float32), parent)
