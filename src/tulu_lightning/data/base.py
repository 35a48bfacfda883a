"""What the three data modules have in common: sources in, whole optimiser steps out."""

import hashlib
from typing import Any, Generic, Literal, TypeVar

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from tulu_lightning.assets.models import load_tokenizer
from tulu_lightning.core.step_plan import StepPlan
from tulu_lightning.data import chat
from tulu_lightning.data.intake import Intake, LeftOut
from tulu_lightning.data.loader import StepLoader
from tulu_lightning.data.sources import Row, Source, load
from tulu_lightning.errors import InputError

__all__ = ["Overflow", "StepData"]

Overflow = Literal["error", "drop"]
Item = TypeVar("Item")


class StepData(L.LightningDataModule, Generic[Item]):
    """Reads, checks and tokenises all rows in `setup`, before any model loads; then gives one step at a time.

    Rows are numbered from 0 over all sources, in order, counting only those that are kept.
    """

    tokenizer: PreTrainedTokenizerBase
    """Loaded by `setup`."""
    template: chat.ChatTemplate
    """Loaded by `setup`."""

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
    ) -> None:
        """Keep the settings; nothing is read yet.

        Args:
            sources: the mixture; every row of every source is used once an epoch.
            tokenizer: model folder or name whose tokenizer is used.
            max_tokens: longest sequence that is kept, in tokens, template included.
            examples_per_step: rows of one optimiser step, over all ranks.
            template: name of the chat template.
            seed: decides the order of the rows.
            epochs: passes over the rows.
            max_steps: number of steps instead of that of `epochs`.
            on_overflow: what to do with a row longer than `max_tokens`: stop, or leave it out and say so. Rows are
                never cut: a cut answer would lose its end token.

        Raises:
            InputError: a number below 1, or an unknown `on_overflow`.
        """
        super().__init__()
        counts = {"max_tokens": max_tokens, "examples_per_step": examples_per_step, "epochs": epochs}
        self._check_counts({**counts, "max_steps": 1 if max_steps is None else max_steps})
        if on_overflow not in ("error", "drop"):
            raise InputError("data.on_overflow", f"is {on_overflow!r}", "Use 'drop' or 'error'.")
        self.sources, self.max_tokens, self.examples_per_step = sources, max_tokens, examples_per_step
        self.seed, self.epochs, self.max_steps, self.on_overflow = seed, epochs, max_steps, on_overflow
        self._tokenizer_path, self._template_name = tokenizer, template
        self._micro_tokens = max_tokens  # nothing is cut into passes here; `PackedData` sets its own
        self._pad_to = 0  # as above
        self._items: list[Item] = []
        self._source_names: list[str] = []
        self._lengths: list[int] = []
        self._digest: str | None = None

    @staticmethod
    def _check_counts(counts: dict[str, int]) -> None:
        for name, count in counts.items():
            if count < 1:
                raise InputError(f"data.{name}", f"is {count}", "Use at least 1.")

    # Reading ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str = "fit") -> None:
        """Read, check and tokenise every row; does nothing the second time.

        Raises:
            InputError: a source, a row, the tokenizer or the template is unfit; or nothing of a source is left.
        """
        if self._items:
            return
        intake = Intake(self.sources)
        rows = {source.name: load(source) for source in self.sources}  # cheap mistakes first
        self.tokenizer = load_tokenizer(self._tokenizer_path)
        self.template = chat.chat_template(self._template_name, self.tokenizer)
        items: list[Item] = []
        names: list[str] = []
        for source in self.sources:
            for number, row in enumerate(rows[source.name], start=1):
                try:
                    items.append(self._read(source, number, row))
                except LeftOut as reason:
                    intake.leave_out(source, str(reason))
                else:
                    intake.keep(source)
                    names.append(source.name)
            intake.check(source)
        self._lengths = [self._tokens(item) for item in items]
        self._items, self._source_names = self._finish(items), names
        if table := intake.table():
            rank_zero_info(table)

    def _read(self, source: Source, number: int, row: Row) -> Item:
        """Check and tokenise one row; raises InputError or LeftOut."""
        raise NotImplementedError

    def _finish(self, items: list[Item]) -> list[Item]:
        return items

    def _check_length(self, source: Source, number: int, tokens: int) -> None:
        if tokens <= self.max_tokens:
            return
        if self.on_overflow == "error":
            remedy = "Raise max_tokens, shorten the row, or set on_overflow to drop."
            found = f"the row has {tokens} tokens, and max_tokens is {self.max_tokens}"
            raise InputError(source.row_name(number), found, remedy)
        raise LeftOut(f"longer than {self.max_tokens} tokens")

    # Steps ------------------------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run, the same for any number of ranks."""
        return self._plan(1).total_steps

    def source_of(self, row: int) -> str:
        """Name of the source that a row came from."""
        return self._source_names[row]

    def token_counts(self) -> dict[str, tuple[int, int, int]]:
        """For each source: rows, tokens, and tokens that are trained."""
        self.setup()
        counts = {source.name: (0, 0, 0) for source in self.sources}
        for name, item, length in zip(self._source_names, self._items, self._lengths, strict=True):
            rows, tokens, trained = counts[name]
            counts[name] = (rows + 1, tokens + length, trained + self._trained(item))
        return counts

    def digest(self) -> str:
        """Hash of the kept rows as they are trained on: token ids, weights, targets, in order. Hexadecimal.

        Nothing of the order, the step size or the cutting into passes is in it.
        """
        self.setup()
        if self._digest is None:
            digest = hashlib.sha256()
            for item in self._items:
                _feed(digest, item)
            self._digest = digest.hexdigest()
        return self._digest

    def _tokens(self, item: Item) -> int:
        raise NotImplementedError

    def _trained(self, item: Item) -> int:
        return 0

    def _plan(self, world_size: int) -> StepPlan:
        self.setup()
        return StepPlan(
            lengths=self._lengths,
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
        rank, world_size = 0, 1
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
            if world_size > 1 and self.trainer._accelerator_connector.use_distributed_sampler:
                remedy = "Set it to false: Lightning would put a shuffling sampler in place of the step plan."
                raise InputError("trainer.use_distributed_sampler", f"is true with {world_size} processes", remedy)
        plan = self._plan(world_size)
        return StepLoader(_Steps(self, plan, rank), plan.total_steps)

    def _step_batch(self, plan: StepPlan, step: int, rank: int) -> Any:
        raise NotImplementedError


def _feed(digest: "hashlib._Hash", value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    elif isinstance(value, tuple) and not all(isinstance(part, int) for part in value):
        digest.update(f"({len(value)}".encode())
        for part in value:
            _feed(digest, part)
    else:
        digest.update(repr(value).encode("utf-8", "surrogatepass"))


class _Steps(Dataset):
    """A run's batches, indexed by step."""

    def __init__(self, data: StepData, plan: StepPlan, rank: int) -> None:
        self.data, self.plan, self.rank = data, plan, rank

    def __getitem__(self, step: int) -> Any:
        return self.data._step_batch(self.plan, step, self.rank)

    def __len__(self) -> int:
        return self.plan.total_steps
