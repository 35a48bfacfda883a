"""What the three data modules have in common: sources in, whole optimiser steps out."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, Literal, TypeVar

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from tulu_lightning.assets.models import generation_eos, load_tokenizer
from tulu_lightning.core.step_plan import StepPlan
from tulu_lightning.data import chat, doctor
from tulu_lightning.data.intake import TooLong, check_names, check_source, intake_table
from tulu_lightning.data.keys import tokenizer_digest
from tulu_lightning.data.loader import StepLoader
from tulu_lightning.data.manifest import manifest_of
from tulu_lightning.data.mixture import repeats
from tulu_lightning.data.rows import Mixed, SourceRows
from tulu_lightning.data.sources import Source, Table, open_source
from tulu_lightning.errors import InputError
from tulu_lightning.ranks import data_place, replaces_sampler

__all__ = ["Overflow", "StepData", "Steps"]

Overflow = Literal["error", "drop", "truncate"]
Item = TypeVar("Item")


class StepData(L.LightningDataModule, Generic[Item]):
    """Reads, checks and tokenises all rows in `setup`, before any model loads; then gives one step at a time.

    Rows are numbered from 0 over all sources, in order, counting only those that are kept; a row that is up-sampled has
    one number for each time it is used.
    """

    tokenizer: PreTrainedTokenizerBase
    """Loaded by `setup`."""
    tokenizer_digest: str
    """Hash of the tokenizer's content; set by `setup`."""
    template: chat.ChatTemplate
    """Loaded by `setup`."""
    checkup: str
    """What the template doctor looked at, in a sentence; set by `setup`, which stops at its first finding."""
    truncates: ClassVar[bool] = False
    """Whether a row can be cut: only where what is left ends as an answer must."""

    def __init__(
        self,
        *,
        sources: list[Source],
        tokenizer: str,
        max_tokens: int,
        examples_per_step: int,
        template: str = "chatml",
        seed: int = 0,
        epochs: int = 1,
        max_steps: int | None = None,
        on_overflow: Overflow = "drop",
        max_dropped_share: float = 0.5,
        accept_changed_data: bool = False,
    ) -> None:
        """Keep the settings; nothing is read yet.

        Args:
            sources: the mixture; every row of every source is used once an epoch, up-sampled ones more often.
            tokenizer: model folder or name whose tokenizer is used.
            max_tokens: longest sequence that is kept, in tokens, template included.
            examples_per_step: rows of one optimiser step, over all ranks.
            template: name of the chat template.
            seed: decides the order of the rows, and which are drawn of a source that is sampled.
            epochs: passes over the rows.
            max_steps: number of steps instead of that of `epochs`.
            on_overflow: what to do with a row longer than `max_tokens`: stop (`error`), leave it out and say so
                (`drop`), or, for conversations, cut it (`truncate`): it still ends in the token that ends an answer.
            max_dropped_share: the run stops if more than this share of a source's rows is left out for length.
            accept_changed_data: go on from a checkpoint although the rows are others than those that the run was
                started with; otherwise that is refused.

        Raises:
            InputError: a number below 1, a share outside of 0 to 1, or an `on_overflow` that is unknown or that these
                rows do not have.
        """
        super().__init__()
        counts = {"max_tokens": max_tokens, "examples_per_step": examples_per_step, "epochs": epochs}
        self._check_counts({**counts, "max_steps": 1 if max_steps is None else max_steps})
        self._check_overflow(on_overflow, max_dropped_share)
        self.sources, self.max_tokens, self.examples_per_step = sources, max_tokens, examples_per_step
        self.seed, self.epochs, self.max_steps, self.on_overflow = seed, epochs, max_steps, on_overflow
        self.max_dropped_share, self.accept_changed_data = max_dropped_share, accept_changed_data
        self._tokenizer_path, self._template_name = tokenizer, template
        self._micro_tokens = max_tokens  # nothing is cut into passes here; `PackedData` sets its own
        self._pad_to = 0  # as above
        self._mixed: Mixed | None = None
        self._items: Sequence[Item] = []
        self._digest: str | None = None

    @staticmethod
    def _check_counts(counts: dict[str, int]) -> None:
        for name, count in counts.items():
            if count < 1:
                raise InputError(f"data.{name}", f"is {count}", "Use at least 1.")

    def _check_overflow(self, rule: str, share: float) -> None:
        if rule not in ("error", "drop", "truncate"):
            raise InputError("data.on_overflow", f"is {rule!r}", "Use 'drop', 'truncate' or 'error'.")
        if rule == "truncate" and not self.truncates:
            what = f"is 'truncate', and a row of {type(self).__name__} cannot be cut without losing what it is for"
            raise InputError("data.on_overflow", what, "Use 'drop' or 'error'.")
        if not 0 <= share <= 1:
            raise InputError("data.max_dropped_share", f"is {share}", "It is a share: 0 to 1.")
        if rule == "error" and share != 0.5:
            raise InputError("data.max_dropped_share", "does nothing with on_overflow: error", "Leave it out.")

    # Reading ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str = "fit") -> None:
        """Read, check and tokenise every row; does nothing the second time.

        Raises:
            InputError: a source, a row, the tokenizer or the template is unfit; nothing of a source is left, or less
                than was asked for; or too much of one is too long.
        """
        if self._mixed is None:
            self._mixed = self._read_all()
            self._items = self._collect(self._mixed)

    def _read_all(self) -> Mixed:
        return self._mix(self.sources, "data.sources")

    def _mix(self, sources: list[Source], where: str) -> Mixed:
        """Open, check, tokenise; cheap mistakes of all sources come first."""
        check_names(sources, where)
        tables = [open_source(source) for source in sources]
        self.tokenizer = load_tokenizer(self._tokenizer_path)
        self.tokenizer_digest = tokenizer_digest(self.tokenizer)
        self.template = chat.chat_template(self._template_name, self.tokenizer)
        rows = [row for pair in zip(sources, tables, strict=True) for row in self._conversations(*pair)]
        self.checkup = doctor.check(self.tokenizer, self.template, self.stop_ids, rows)
        parts: list[SourceRows] = []
        for source, table in zip(sources, tables, strict=True):
            parts.append(self._prepare(source, table))
            check_source(source, parts[-1].counts, self.max_dropped_share)
        if table := intake_table({part.name: part.counts for part in parts}):
            rank_zero_info(table)
        picks = [
            np.asarray(repeats(source, part.counts.kept, self.seed), dtype=np.int64)
            for source, part in zip(sources, parts, strict=True)
        ]
        return self._mixed_type(tuple(parts), tuple(picks))

    _mixed_type: ClassVar[type[Mixed]] = Mixed

    def _conversations(self, source: Source, table: Table) -> list[doctor.Named]:
        """Names and messages of the rows that the template doctor looks at, besides its own probes."""
        return []

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the tokenizer's EOS, its folder's generation config's, the template's end of turn."""
        if not hasattr(self, "template"):
            self.setup()
        return chat.stop_ids(self.tokenizer, self.template, generation_eos(self._tokenizer_path))

    def _prepare(self, source: Source, table: Table) -> SourceRows:
        """What is kept of one source, tokenised."""
        raise NotImplementedError

    def _encode(self, source: Source, numbers: Sequence[int], rows: Sequence[Any]) -> list[Any]:
        """Check and tokenise a chunk of rows (numbered from 1): for each what is kept, or the LeftOut why not.

        Raises:
            InputError: one of them is malformed, or too long where that stops the run.
        """
        raise NotImplementedError

    def _collect(self, mixed: Mixed) -> Sequence[Item]:
        return mixed

    def _too_long(self, source: Source, number: int, tokens: int) -> TooLong | None:
        """Why a row of so many tokens is left out, if it is.

        Raises:
            InputError: `on_overflow` is `error`.
        """
        if tokens <= self.max_tokens:
            return None
        if self.on_overflow == "error":
            remedy = "Raise max_tokens, shorten the row, or set on_overflow to drop."
            found = f"the row has {tokens} tokens, and max_tokens is {self.max_tokens}"
            raise InputError(source.row_name(number), found, remedy)
        return TooLong(f"longer than {self.max_tokens} tokens")

    # Steps ------------------------------------------------------------------------------------------------------

    @property
    def mixed(self) -> Mixed:
        """The rows, set up."""
        self.setup()
        assert self._mixed is not None
        return self._mixed

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run, the same for any number of ranks."""
        return self._plan(1).total_steps

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources, in order."""
        return tuple(part.name for part in self.mixed.sources)

    @property
    def source_numbers(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Index into `source_names` for each row; int32."""
        return self.mixed.source_numbers

    def source_of(self, row: int) -> str:
        """Name of the source that a row came from."""
        return self.source_names[self.source_numbers[row]]

    def token_counts(self) -> dict[str, tuple[int, int, int]]:
        """For each source: rows, tokens, and tokens that are trained, of one epoch."""
        sources = self.manifest()["sources"]
        return {name: (known["used"], known["tokens"], known["trained_tokens"]) for name, known in sources.items()}

    def digest(self) -> str:
        """Hash of the kept rows as they are trained on: token ids, weights, targets, in order. Hexadecimal.

        Nothing of the order, the step size or the cutting into passes is in it.
        """
        if self._digest is None:
            self._digest = self.mixed.digest()
        return self._digest

    def manifest(self) -> dict[str, Any]:
        """What the run is trained on, as plain values; see `data.manifest.manifest_of`."""
        mixed = self.mixed
        own = {"tokenizer": self._tokenizer_path, "tokenizer_digest": self.tokenizer_digest}
        return manifest_of(mixed, {"seed": self.seed, "template": self._template_name, **own, **self._token_settings()})

    def _token_settings(self) -> dict[str, Any]:
        """Settings that decide what the tokens of a row are and whether it is kept; plain values.

        A subclass that encodes by settings of its own adds them: the cache tells rows apart by them.
        """
        return {"max_tokens": self.max_tokens, "on_overflow": self.on_overflow}

    def _plan(self, world_size: int) -> StepPlan:
        return StepPlan(
            lengths=torch.from_numpy(self.mixed.lengths),
            examples_per_step=self.examples_per_step,
            micro_tokens=self._micro_tokens,
            seed=self.seed,
            epochs=self.epochs,
            max_steps=self.max_steps,
            world_size=world_size,
            pad_to=self._pad_to,
        )

    def train_dataloader(self) -> StepLoader:
        """One item a step: this rank's share of it.

        Raises:
            InputError: several ranks while Lightning is set to replace the sampler.
        """
        rank, world_size = self._place()
        plan = self._plan(world_size)
        return StepLoader(Steps(self._step_batch, plan, rank), plan.total_steps)

    def _place(self) -> tuple[int, int]:
        """Rank and number of ranks."""
        rank, world_size = data_place(self.trainer)
        if replaces_sampler(self.trainer):
            remedy = "Set it to false: Lightning would put a shuffling sampler in place of the step plan."
            raise InputError("trainer.use_distributed_sampler", "is true", remedy)
        return rank, world_size

    def _step_batch(self, plan: StepPlan, step: int, rank: int) -> Any:
        raise NotImplementedError


class Steps(Dataset):
    """A run's batches, indexed by step."""

    def __init__(self, make: Callable[[StepPlan, int, int], Any], plan: StepPlan, rank: int) -> None:
        self.make, self.plan, self.rank = make, plan, rank

    def __getitem__(self, step: int) -> Any:
        return self.make(self.plan, step, self.rank)

    def __len__(self) -> int:
        return self.plan.total_steps
