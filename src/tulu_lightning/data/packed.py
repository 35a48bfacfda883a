"""Steps made of packs: the base of the data modules for SFT and preferences."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from tulu_lightning.core.packing import filler, pack
from tulu_lightning.core.step_plan import StepPlan
from tulu_lightning.data import doctor
from tulu_lightning.data.base import Overflow, StepData, Steps
from tulu_lightning.data.cache import Entry, Job, Kept, load_or_build
from tulu_lightning.data.chat import Message, Train
from tulu_lightning.data.criteria import Predicate
from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.keys import code_digest, key
from tulu_lightning.data.loader import StepLoader
from tulu_lightning.data.manifest import manifest_of
from tulu_lightning.data.mixture import order, wanted
from tulu_lightning.data.rows import Documents, Mixed, SourceRows
from tulu_lightning.data.sources import FORMATS, Row, Source, Table, check_format
from tulu_lightning.errors import InputError
from tulu_lightning.types import Document, Pack, StepBatch

__all__ = ["PackedData"]

PLACE = {"name", "path", "hub", "subset", "split", "revision", "rows", "args", "upsample", "decontaminate"}
"""Fields of a source that do not decide tokens: where its rows are from (their content does), how often they are used."""
DRAWN = ("fraction", "count", "cap")
"""Fields that make a source a sample, which depends on the seed and the source's name."""
EXAMINED = 50
"""Rows of each source that the template doctor looks at."""


class PackedData(StepData[Document]):
    """Base of the data modules whose steps are packs of documents (SFT, preferences).

    Tokenised rows are kept in the cache by content (`data.cache`) and mapped from there: none is in memory until a step
    needs it.
    """

    truncates: ClassVar[bool] = True
    formats: ClassVar[tuple[str, ...]] = FORMATS
    """What `Source.read` may say here, beside an import path."""
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
        train: Train = "all",
        validation: list[Source] | None = None,
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
            train: which assistant turns are trained: `all`, or only the `last` of each conversation.
            validation: rows that are not trained on: their loss is logged as `val_loss` (`tulu validate`, and in a fit
                whenever the trainer validates).

        Raises:
            InputError: a number below 1, a `pad_to` that does not divide `micro_tokens`, an unknown `train`, an empty
                `validation`, or anything that `StepData` refuses.
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
            trained = self.checkup
            mixed = self._mix(self.validation, "data.validation")
            assert isinstance(mixed, Documents)
            self.checkup = f"{trained}\nvalidation: {self.checkup}"
            self._validation = mixed

    def manifest(self) -> dict[str, Any]:
        """As in `StepData`; with `validation`, the sources of those rows."""
        manifest = super().manifest()
        if (held_out := self.validation_documents) is not None:
            manifest["validation"] = manifest_of(held_out, {})
        return manifest

    def _mix(self, sources: list[Source], where: str) -> Mixed:
        for source in sources:
            check_format(source, self.formats, type(self).__name__)
        return super()._mix(sources, where)

    def _conversations(self, source: Source, table: Table) -> list[doctor.Named]:
        indices = range(min(EXAMINED, len(table)))
        numbers = [table.number(index) for index in indices]
        read = zip(numbers, self._read(source, numbers, table.take(indices)), strict=True)
        examined = ((number, self._examined(row)) for number, row in read if not isinstance(row, LeftOut))
        return [(source.row_name(number), messages) for number, messages in examined if messages is not None]

    def _examined(self, row: Any) -> Sequence[Message] | None:
        """What the template doctor looks at of a row (as `_row` gave it), if anything."""
        raise NotImplementedError

    def _prepare(self, source: Source, table: Table) -> SourceRows:
        total = len(table)
        entry = self._entry(source, table, order(source, total, self.seed), wanted(source, total))
        store = entry.store
        read = (entry.counts, entry.digest, table.fingerprint, table.repeating)
        return SourceRows(source.name, store, store.lengths, store.scored, *read)

    def _entry(self, source: Source, table: Table, tried: Sequence[int], enough: int | None) -> Entry:
        def read(indices: Sequence[int]) -> tuple[list[int], list[Any]]:
            numbers = [table.number(index) for index in indices]
            return numbers, self._read(source, numbers, table.take(indices))

        def encode(chunk: tuple[list[int], list[Any]]) -> list[Kept | LeftOut]:
            return self._encode(source, *chunk)

        return load_or_build(self._key(source, table), Job(source.name, len(table), tried, enough, encode, read))

    def _read(self, source: Source, numbers: Sequence[int], rows: Sequence[Row]) -> list[Any]:
        """A chunk of rows (numbered from 1) as `_encode` takes them; runs beside that of the chunk before."""
        read: list[Any] = []
        for number, row in zip(numbers, rows, strict=True):
            try:
                read.append(self._row(source, number, row))
            except LeftOut as reason:
                read.append(reason.with_traceback(None))
        return read

    def _row(self, source: Source, number: int, row: Row) -> Any:
        """One row in the form in which it is tokenised.

        Raises:
            InputError: it is malformed.
            LeftOut: it is well formed and not to be used.
        """
        raise NotImplementedError

    def _token_settings(self) -> dict[str, Any]:
        return {**super()._token_settings(), "train": self.train}

    def _key(self, source: Source, table: Table) -> str:
        """Name of a source's tokens in the cache: whatever could change one of them is in it, and nothing else."""
        own = {name: value for name, value in dataclasses.asdict(source).items() if name not in PLACE}
        drawn = [source.name, self.seed] if any(getattr(source, name) is not None for name in DRAWN) else None
        template = {name: value for name, value in vars(self.template).items() if isinstance(value, str)}
        functions = [criterion.function for criterion in source.filters if isinstance(criterion, Predicate)]
        return key(
            {
                "kind": f"{type(self).__module__}.{type(self).__qualname__}",
                "code": code_digest(type(self), source.read, *functions),
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
    def validation_documents(self) -> Documents | None:
        """The rows of `validation`, tokenised."""
        self.setup()
        return self._validation

    @property
    def document_sets(self) -> tuple[Documents, ...]:
        """All rows that the model will read: the training rows, then those of `validation`."""
        held_out = self.validation_documents
        return (self.documents,) if held_out is None else (self.documents, held_out)

    # Steps ------------------------------------------------------------------------------------------------------

    def packs(self, rows: Sequence[int], micro_tokens: int, documents: Documents | None = None) -> Iterator[Pack]:
        """The given rows as packs of at most `micro_tokens` tokens, the longest rows first (out of order, then).

        Args:
            rows: numbers of rows.
            micro_tokens: limit of a pack; a longer row gets one of its own.
            documents: what the numbers count; the training rows if left out.
        """
        documents = self.documents if documents is None else documents
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
        return StepLoader(Steps(partial(self._batch, documents), plan, rank), plan.total_steps)

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
