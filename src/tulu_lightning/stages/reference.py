"""The frozen start model's log-probs of both answers of each pair, which preference losses compare the policy with.

They do not change while the policy trains. So they are computed once for every row, before the first step, kept on disk
by source (`reference_cache`), and carried in the checkpoint: under full fine-tuning the start weights are gone after the
first step. Or (`live`) the start model stays beside the policy and is asked at every step.

Neither the order of the rows nor their packing or the number of ranks changes a row's numbers, except by rounding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tulu_lightning.core.pairs import Pair, side_sums
from tulu_lightning.core.settings import require
from tulu_lightning.data.rows import Documents
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import PackedLM
from tulu_lightning.models.lora import without_adapters
from tulu_lightning.models.sharding import Fsdp2
from tulu_lightning.stages.optimizer import sample
from tulu_lightning.stages.reference_cache import LogpCache
from tulu_lightning.stages.stage import Stage
from tulu_lightning.types import Pack

__all__ = ["Mode", "Reference", "StartModel", "pair_logps"]

Mode = Literal["cached", "live"]


@dataclass(frozen=True)
class Reference:
    """Where the frozen start model's log-probs come from."""

    mode: Mode = "cached"
    """`cached`: computed once for every row, kept on disk. `live`: computed at every step, by a second copy of the start
    weights in memory (with LoRA by the policy without its adapters)."""
    folder: str | None = None
    """Where cached ones are kept; $TULU_REFERENCE, or `reference` in the cache, when null. One that holds numbers of the
    same rows from other weights is refused."""

    def __post_init__(self) -> None:
        require(self.mode in ("cached", "live"), "reference.mode", repr(self.mode), "Use 'cached' or 'live'.")
        idle = self.mode == "live" and self.folder is not None
        require(not idle, "reference.folder", f"{self.folder} with mode live, which keeps nothing", "Leave it out.")


def pair_logps(model: PackedLM, pack: Pack) -> Pair:
    """Summed log-probs of both answers of each pair, in nats; of a filler none, but its pass is made."""
    return side_sums(model(pack).logp_N, pack)


def _reached(data: Any, step: int) -> Any:
    """bool [rows], the training rows that the run's plan reaches from a step on. A trial of few steps needs few of them."""
    plan = data._plan(1)
    if plan.total_steps >= plan.steps_per_epoch:
        return np.ones(len(data.documents), dtype=bool)
    reached = np.zeros(len(data.documents), dtype=bool)
    for later in range(step, plan.total_steps):
        reached[list(plan.examples(later))] = True
    return reached


class StartModel:
    """The start model as a stage asks it: log-probs of a pack's pairs. Every rank makes the same calls.

    Args:
        stage: the stage, whose policy is the start model until its first step.
        settings: cached or live.
    """

    def __init__(self, stage: Stage, settings: Reference) -> None:
        self.stage, self.settings = stage, settings
        self.cache = LogpCache(stage, settings.folder, self._ask)
        self._built: dict[str, Tensor] = {}  # bytes of some of each tensor as it was loaded
        self._copy: PackedLM | None = None  # held here and not by the stage: neither trained nor saved
        self._known: dict[str, Tensor] = {}
        self._tables: dict[str, Tensor] = {}

    def __call__(self, pack: Pack, rows: str = "train") -> Pair:
        """log π_ref of both answers of each of the pack's pairs.

        Args:
            pack: a micro-batch.
            rows: name of the prepared documents that its rows are of.
        """
        if self.settings.mode == "live":
            return self._ask(pack)
        logps_B2 = self._tables[rows][list(pack.rows)].to(pack.tokens_T.device)
        return Pair(logps_B2[:, 0], logps_B2[:, 1])

    @torch.no_grad()
    def _ask(self, pack: Pack) -> Pair:
        if self._copy is not None:
            return pair_logps(self._copy, pack)
        with without_adapters(self.stage.model.lm):
            return pair_logps(self.stage.model, pack)

    def build(self) -> None:
        """Load the copy that `live` asks under full fine-tuning; the policy is built by now."""
        backbone = self.stage.backbone
        if self.settings.mode == "cached" and not self._built:
            self._built = self._sampled()
        if self.settings.mode == "live" and backbone.lora is None and self._copy is None:
            config = replace(backbone, activation_checkpointing=False)
            frozen = lambda: PackedLM(config, self.stage.folder).requires_grad_(False)  # noqa: E731
            self._copy = self.stage.placed(frozen, config)

    def check(self, sets: Mapping[str, Documents]) -> None:
        """Refuse a chosen folder that holds the same rows' numbers from another model, before weights load.

        Raises:
            InputError: it does.
        """
        if self.settings.mode == "cached":
            for documents in sets.values():
                self.cache.check(documents)

    def prepare(self, sets: Mapping[str, Documents]) -> None:
        """Have the numbers of all rows of the named documents: from the checkpoint, the disk, or computed now.

        Raises:
            InputError: what `LogpCache.load_or_compute` finds; or the policy, which is asked for them, is not the start
                model any more, although it has made no step.
        """
        if self.settings.mode == "cached":
            self._require_start()
            # By the rows' content: numbers that a checkpoint brought are never those of other rows.
            digests = {name: documents.digest() for name, documents in sets.items()}
            for name, documents in sets.items():
                self._known[digests[name]] = self._completed(name, documents, self._known.get(digests[name]))
            self._tables = {name: self._known[digest] for name, digest in digests.items()}
        elif self._copy is not None and not isinstance(self.stage.trainer.strategy, Fsdp2):
            self._copy.to(self.stage.device)

    def _sampled(self) -> dict[str, Tensor]:
        """Bytes of some elements of each of the policy's tensors, without adapters, which are off when it is asked."""
        self.stage.model.state_dict()  # FSDP2 puts its shards back for it
        named = self.stage.model.named_parameters()
        return {name: sample(one).cpu().view(torch.uint8) for name, one in named if ".lora_" not in name}

    def _require_start(self) -> None:
        """Refuse to keep, as those of the start weights, numbers of weights that were changed in Python since."""
        if self.stage.step and self.stage.backbone.lora is None:
            return  # trained: then nothing is computed
        now = self._sampled()
        changed = [name for name, was in self._built.items() if not torch.equal(was, now[name])]
        strategy: Any = self.stage.trainer.strategy
        if strategy.reduce_boolean_decision(bool(changed), all=False):
            what = f"its weights were changed after they were loaded{f' ({changed[0]})' if changed else ''}"
            told = f"{what}, and the reference log-probs of a run are kept under those of the folder"
            remedy = (
                "Save the model into a folder of its own and start from that, or set model.init_args.reference to live."
            )
            raise InputError(self.stage.start, told, remedy)

    def _completed(self, name: str, documents: Documents, known: Tensor | None) -> Tensor:
        """The numbers of a set's rows, with those that are needed and not known yet.

        Known ones may be of fewer rows: of a shorter plan, of another order of rows, or of the same rows as another set.
        """
        data: Any = self.stage.trainer.datamodule  # type: ignore[attr-defined]
        needed = _reached(data, self.stage.step) if name == "train" else np.ones(len(documents), dtype=bool)
        if known is None:
            return self.cache.load_or_compute(documents, needed)
        missing = known.isnan().any(1)
        needed &= missing.numpy()
        if not needed.any():
            return known
        return torch.where(missing[:, None], self.cache.load_or_compute(documents, needed), known)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint carries: float32 [rows, 2] by the hash of the rows."""
        return dict(self._known)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what a checkpoint carried."""
        self._known = dict(state)
