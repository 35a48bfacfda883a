"""Steps made of packs: the base of the data modules for SFT and preferences."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from tulu_lightning.core.packing import filler, pack
from tulu_lightning.core.step_plan import StepPlan
from tulu_lightning.data.base import Overflow, StepData
from tulu_lightning.data.cache import Entry, Job, Kept, load_or_build
from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.keys import code_digest, key
from tulu_lightning.data.mixture import order, wanted
from tulu_lightning.data.rows import Documents, Mixed, SourceRows
from tulu_lightning.data.sources import Row, Source, Table
from tulu_lightning.errors import InputError
from tulu_lightning.types import Document, Pack, StepBatch

__all__ = ["PackedData"]

PLACE = {"name", "path", "hub", "subset", "split", "revision", "rows", "args", "upsample"}
"""Fields of a source that do not decide tokens: where its rows are from (their content does), how often they are used."""
DRAWN = ("fraction", "count", "cap")
"""Fields that make a source a sample, which depends on the seed and the source's name."""


class PackedData(StepData[Document]):
    """Base of the data modules whose steps are packs of documents (SFT, preferences).

    Tokenised rows are kept in the cache by content (`data.cache`) and mapped from there: none is in memory until a step
    needs it.
    """

    _mixed_type: ClassVar[type[Mixed]] = Documents

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
            max_dropped_share: as in `StepData`.
            accept_changed_data: as in `StepData`.
            pad_to: fill packs and pad them to a multiple of so many tokens, for a compiled model that wants few
                shapes (`micro_tokens` itself makes it one); 0 = no padding. Never seen in the gradient.

        Raises:
            InputError: a number below 1, a `pad_to` that does not divide `micro_tokens`, or anything that `StepData`
                refuses.
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
            max_dropped_share=max_dropped_share,
            accept_changed_data=accept_changed_data,
        )
        self._check_counts({"micro_tokens": micro_tokens})
        if pad_to < 0 or (pad_to and micro_tokens % pad_to):
            remedy = f"Use 0 for no padding, or a divisor of micro_tokens, which is {micro_tokens}."
            raise InputError("data.pad_to", f"is {pad_to}", remedy)
        self.micro_tokens = self._micro_tokens = micro_tokens
        self.pad_to = self._pad_to = pad_to

    # Reading ----------------------------------------------------------------------------------------------------

    def _prepare(self, source: Source, table: Table) -> SourceRows:
        total = len(table)
        entry = self._entry(source, table, order(source, total, self.seed), wanted(source, total))
        store = entry.store
        return SourceRows(
            source.name, store, store.lengths, store.scored, entry.counts, entry.digest, table.fingerprint
        )

    def _entry(self, source: Source, table: Table, tried: Sequence[int], enough: int | None) -> Entry:
        def read(indices: Sequence[int]) -> tuple[list[int], list[Any]]:
            numbers = [table.number(index) for index in indices]
            return numbers, self._read(source, numbers, table.take(indices))

        def encode(chunk: tuple[list[int], list[Any]]) -> list[Kept | LeftOut]:
            return self._encode(source, *chunk)

        return load_or_build(self._key(source, table), Job(source.name, len(table), tried, enough, encode, read))

    def _read(self, source: Source, numbers: Sequence[int], rows: Sequence[Row]) -> list[Any]:
        """A chunk of rows (numbered from 1) as `_encode` takes them; runs beside that of the chunk before."""
        return list(rows)

    def _key(self, source: Source, table: Table) -> str:
        """Name of a source's tokens in the cache: whatever could change one of them is in it, and nothing else."""
        own = {name: value for name, value in dataclasses.asdict(source).items() if name not in PLACE}
        drawn = [source.name, self.seed] if any(getattr(source, name) is not None for name in DRAWN) else None
        template = {name: value for name, value in vars(self.template).items() if isinstance(value, str)}
        return key(
            {
                "kind": f"{type(self).__module__}.{type(self).__qualname__}",
                "code": code_digest(type(self), source.read, *_texts(source.filters)),
                "rows": table.fingerprint,
                "source": own,
                "drawn": drawn,
                "tokenizer": self.tokenizer_digest,
                "template": template,
                "settings": self._token_settings(),
            }
        )

    @property
    def documents(self) -> Documents:
        """The kept rows, tokenised: a sequence that reads a row when it is asked for one."""
        mixed = self.mixed
        assert isinstance(mixed, Documents)
        return mixed

    @property
    def document_sets(self) -> tuple[Documents, ...]:
        """All rows that the model will read, training rows first."""
        return (self.documents,)

    # Steps ------------------------------------------------------------------------------------------------------

    def packs(self, rows: Sequence[int], micro_tokens: int) -> Iterator[Pack]:
        """The given rows as packs of at most `micro_tokens` tokens, the longest rows first (out of order, then).

        For passes over the data that are not training, such as the reference's log-probs.
        """
        documents = self.documents
        lengths = documents.lengths
        group: list[int] = []
        size = 0
        chosen = np.asarray(rows, dtype=np.int64)
        for row in chosen[np.lexsort((chosen, -lengths[chosen]))].tolist():
            tokens = int(lengths[row])
            if group and size + tokens > micro_tokens:
                yield self._pack(documents, group)
                group, size = [], 0
            group.append(row)
            size += tokens
        if group:
            yield self._pack(documents, group)

    def _pack(self, documents: Documents, rows: Sequence[int]) -> Pack:
        return pack([documents[row] for row in rows], rows, self.pad_to, self._pad_id)

    @property
    def _pad_id(self) -> int:
        """Any token of the vocabulary would do: nobody reads what comes of it."""
        pad_id = self.tokenizer.pad_token_id
        return pad_id if isinstance(pad_id, int) else 0

    def _denominator(self, documents: Documents, rows: Sequence[int]) -> float:
        """What the summed loss of a whole step is divided by."""
        raise NotImplementedError

    def _step_batch(self, plan: StepPlan, step: int, rank: int) -> StepBatch:
        return self._batch(self.documents, plan, step, rank)

    def _batch(self, documents: Documents, plan: StepPlan, step: int, rank: int) -> StepBatch:
        rows = plan.examples(step)
        packs = tuple(
            self._pack(documents, micro)
            if micro
            else filler(documents[min(rows, key=lambda row: documents.lengths[row])], self.pad_to, self._pad_id)
            for micro in plan.micro_batches(step, rank)
        )
        return StepBatch(step, packs, self._denominator(documents, rows), rows)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a setting, however nested: one may be an import path."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _texts(dataclasses.asdict(value))
