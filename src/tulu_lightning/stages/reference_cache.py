"""The start model's log-probs of every row: found on disk, or computed once, by all ranks together.

Each rank computes its share of a chunk of rows, in packs like those of training; the sum over ranks gives all numbers to
each. Only the first rank touches the disk.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor

from tulu_lightning.checkpoints.identity import Value, config_digest, flat
from tulu_lightning.core.packing import filler, pack
from tulu_lightning.core.preference import Pair
from tulu_lightning.core.step_plan import cut
from tulu_lightning.data.rows import Documents, SourceRows
from tulu_lightning.errors import InputError
from tulu_lightning.models.sharding import Fsdp2
from tulu_lightning.progress import Progress, duration
from tulu_lightning.stages.reference_store import Entry, reference_dir, refuse_others
from tulu_lightning.stages.stage import Stage
from tulu_lightning.types import Pack

__all__ = ["LogpCache"]

CHUNK = 128
"""Rows that each rank computes between two writes: what a kill can cost."""


class _Refusal(NamedTuple):
    """An InputError on its way to the other ranks."""

    where: str
    what: str
    remedy: str


class LogpCache:
    """Log-probs by source. Every rank makes the same calls, as they are collectives.

    Args:
        stage: whose start model it is.
        folder: where to keep them; see `reference_dir`.
        compute: the start model's log-probs of a pack, without gradient.
    """

    def __init__(self, stage: Stage, folder: str | None, compute: Callable[[Pack], Pair]) -> None:
        self.stage, self.folder, self.compute = stage, folder, compute
        self._pairs, self._tokens, self._seconds = 0, 0, 0.0

    def check(self, documents: Documents) -> None:
        """Refuse a chosen folder that holds the same rows' numbers from another model.

        Raises:
            InputError: it does.
        """

        def refuse() -> None:
            for part in documents.sources:
                refuse_others(self._entry(part), self.stage.start)

        if self.folder is not None:
            self._shared(refuse)

    def load_or_compute(self, documents: Documents, needed: Any = None) -> Tensor:
        """float32 [rows, 2]: summed log-probs of chosen and rejected, in nats.

        Args:
            documents: the rows.
            needed: bool [rows], those that the run reaches; all if left out. Others may come out as NaN.

        Raises:
            KeyboardInterrupt: the run was told to stop; what was computed is kept.
            InputError: they are not on disk and the start weights are gone; the folder cannot be written; or the start
                model gives a row no finite log-prob.
        """
        self._pairs, self._tokens, self._seconds = 0, 0, 0.0
        bounds = np.cumsum([0, *(len(pick) for pick in documents.picks)])
        found = []
        for part, pick, start in zip(documents.sources, documents.picks, bounds, strict=False):
            wanted = np.ones(len(part.items), dtype=bool)
            if needed is not None:
                wanted[:] = False
                wanted[pick[needed[start : start + len(pick)]]] = True
            found.append(self._of_source(part, wanted))
        values = np.concatenate([one[pick] for one, pick in zip(found, documents.picks, strict=True)])
        if self._pairs and self._first:
            rate = f"{self._pairs / max(self._seconds, 1e-9):.1f} pairs/s"
            cost = f"{self._pairs:,} pairs, {self._tokens:,} tokens in {duration(self._seconds)}, {rate}"
            self._say(f"reference: {cost}; kept in {reference_dir(self.folder)}")
        elif self._first:
            known = int(np.isfinite(values).all(axis=1).sum())
            self._say(f"reference: log-probs of {known:,} pairs found in {reference_dir(self.folder)}")
        return torch.from_numpy(values)

    # One source -------------------------------------------------------------------------------------------------

    def _of_source(self, part: SourceRows, wanted: Any) -> Any:
        """float32 [kept rows, 2], on every rank, not NaN where wanted; only the first touches the disk."""
        entry = self._entry(part)
        values = self._shared(entry.read)
        if values is not None:
            return values
        if not wanted.any():
            return np.full((len(part.items), 2), np.nan, dtype=np.float32)
        if self.stage.step and self.stage.backbone.lora is None:
            # The weights have moved: their log-probs would make a reference of the policy itself.
            what = (
                f"neither it nor the checkpoint has the log-probs of source {part.name!r} under the start weights, which "
                "have been trained since"
            )
            remedy = "Set model.init_args.reference to live, which loads the start weights again; or start a new run."
            raise InputError(str(entry.root), what, remedy)
        with self._held(entry):
            values = self._shared(entry.open)  # it may be finished by now
            self._fill(part, entry, values, wanted)
        return values

    def _fill(self, part: SourceRows, entry: Entry, values: Any, wanted: Any) -> None:
        missing = np.flatnonzero(np.isnan(values).any(axis=1) & wanted)
        if not missing.size:
            return
        started, size = time.perf_counter(), CHUNK * self.stage.place[1]
        label, total = f"reference of {part.name}", int(wanted.sum())
        before = total - len(missing)
        shown = Progress(label, total, before, unit="pairs") if self._first else nullcontext()
        with shown as progress, torch.inference_mode(False), torch.no_grad():
            for start in range(0, len(missing), size):
                rows = missing[start : start + size]
                values[rows] = self._chunk(part, rows)
                self._require_finite(part, rows, values[rows])
                if self._first:
                    entry.write(rows, values[rows])
                if progress is not None:
                    progress.update(before + start + len(rows))
                if start + size < len(missing):
                    self._leave_if_told()
        if self._first and not np.isnan(values).any():
            entry.finish()
        self._pairs += len(missing)
        self._tokens += int(part.lengths[missing].sum())
        self._seconds += time.perf_counter() - started

    def _leave_if_told(self) -> None:
        """End the run between two chunks if any rank was signalled; `callbacks.checkpoints` keeps the flag."""
        callbacks: list[Any] = self.stage.trainer.callbacks  # type: ignore[attr-defined]
        told = any(getattr(callback, "stop_requested", False) for callback in callbacks)
        if self._strategy.reduce_boolean_decision(told, all=False):
            raise KeyboardInterrupt

    def _chunk(self, part: SourceRows, rows: Any) -> Any:
        """The numbers of some rows, each rank its share of packs; the sum over ranks gives all of them to each."""
        data: Any = self.stage.trainer.datamodule  # type: ignore[attr-defined]
        lengths = part.lengths[rows].tolist()
        logps = torch.zeros(len(rows), 2)
        shortest = part.items[int(rows[np.argmin(lengths)])]
        dealt = cut(lengths, data.micro_tokens, self.stage.place[1], data.pad_to)
        for micro in dealt[self.stage.place[0]]:
            documents = [part.items[int(rows[i])] for i in micro]
            packed = pack(documents, micro, data.pad_to) if micro else filler(shortest, data.pad_to)
            pairs = self.compute(self._strategy.batch_to_device(packed))
            if micro:
                logps[list(micro)] = torch.stack(list(pairs), 1).float().cpu()
        return self.stage.reduce_sum(logps).numpy()

    def _require_finite(self, part: SourceRows, rows: Any, values: Any) -> None:
        wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if wrong.size:
            number = part.items.numbers[rows[wrong[0]]] + 1  # type: ignore[attr-defined]
            what = f"gives an answer of source {part.name!r}, row {number} the log-prob {values[wrong[0]].tolist()}"
            remedy = "Check its weights, and set backbone.compute_dtype to float32 if they are sound."
            raise InputError(self.stage.start, what, remedy)

    def _entry(self, part: SourceRows) -> Entry:
        return Entry(reference_dir(self.folder), part.digest, len(part.items), self._arithmetic, part.name)

    @property
    def _arithmetic(self) -> dict[str, Value]:
        """What decides the numbers, beside the rows.

        Adapters do not: they are off. Packing, ranks and the attention kernel change rounding alone, and so does FSDP2
        in fp32; in bf16 it also keeps the residual stream in bf16, which autocast does not.
        """
        backbone = self.stage.backbone
        sharded = isinstance(self._strategy, Fsdp2) and backbone.compute_dtype != "float32"
        return {
            "start weights": self.stage.start_digest,
            "start config": config_digest(self.stage.folder),
            "compute_dtype": backbone.compute_dtype,
            "weights_dtype": backbone.weights_dtype,
            "layers": backbone.layers,
            **({} if backbone.quantize is None else flat("quantize", backbone.quantize)),
            "device": self._strategy.root_device.type,
            "sharded": sharded,
            "transformers": transformers.__version__,
        }

    # Ranks ------------------------------------------------------------------------------------------------------

    @property
    def _strategy(self) -> Any:
        return self.stage.trainer.strategy

    @property
    def _first(self) -> bool:
        return self.stage.trainer.is_global_zero

    def _shared(self, make: Callable[[], Any]) -> Any:
        """What the first rank makes, on every rank; what it refuses, every rank refuses."""
        made: Any = None
        if self._first:
            try:
                made = make()
            except InputError as error:
                made = _Refusal(error.where, error.what, error.remedy)
        made = self._strategy.broadcast(made)
        if isinstance(made, _Refusal):
            raise InputError(*made)
        return made

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    @contextmanager
    def _held(self, entry: Entry) -> Iterator[None]:
        """The entry to ourselves. The ranks ask again and again: one long wait would end in a collective's time-out."""
        with ExitStack() as held:
            told = False
            while not self._shared(lambda: held.enter_context(entry.alone())):
                if self._first and not told:
                    said = f"source {entry.label!r}: another process is computing its reference log-probs"
                    self._say(f"{said} ({entry.folder}); waiting for it")
                told = True
                time.sleep(1)
            yield
