"""Direct preference optimisation, length-normalised by default (Tülu 3, section 5), and the losses related to it."""

from typing import Any

from torch import Tensor

from tulu_lightning.core.pairs import side_lengths
from tulu_lightning.core.preference import DPO as DPOLoss
from tulu_lightning.core.preference import PreferenceLoss, pair_metrics
from tulu_lightning.core.settings import require
from tulu_lightning.data.rows import Documents
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.ranks import over_rows
from tulu_lightning.stages.checks import check_pairs, check_tokenizer
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.pair_metrics import PairMetrics
from tulu_lightning.stages.reference import Mode, Reference, StartModel, pair_logps
from tulu_lightning.stages.stage import Stage
from tulu_lightning.types import Pack, StepBatch

__all__ = ["DPO"]

METRICS = (
    "loss", "rewards_chosen", "rewards_rejected", "margin", "accuracy",
    "logp_chosen", "logp_rejected", "length_chosen", "length_rejected",
)  # fmt: skip
"""What `pair_metrics` gives for any loss, and for one with a reference `KL` too; all of it by source as well."""
KL = ("kl_chosen", "kl_rejected")
VALIDATED = ("loss", "accuracy", "margin")


class DPO(Stage):
    """A preference loss on pairs whose common start is computed once.

    Args:
        backbone: the policy's start, and the frozen reference.
        optimizer: AdamW and schedule.
        loss: DPO of length-normalised log-probs when left out; one of `core.preference`, or your own.
        reference: where the reference's log-probs come from; `cached` and `live` are short for its mode. They are
            computed for a loss that reads them only.

    Raises:
        InputError: a reference for a loss that has none.
    """

    without_rows = " Or set model.init_args.reference to live, which keeps none."

    def __init__(
        self,
        backbone: Backbone,
        optimizer: AdamW,
        loss: PreferenceLoss | None = None,
        reference: Reference | Mode | None = None,
    ) -> None:
        super().__init__(backbone, optimizer)
        self.loss = loss or DPOLoss()
        known = isinstance(self.loss, PreferenceLoss)
        require(known, "model.loss", repr(loss), "Give a loss of core.preference, such as DPO() or IPO().")
        idle = reference is not None and not self.loss.needs_reference
        name = type(self.loss).__name__
        require(not idle, "model.reference", f"set, and {name} compares with no reference", "Leave it out.")
        settings = Reference(reference) if isinstance(reference, str) else reference or Reference()
        self.reference = StartModel(self, settings) if self.loss.needs_reference else None
        self.validation: PairMetrics | None = None

    # The step ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """One global step over all its pairs."""
        totals = self._totals()
        for pack in batch.packs:
            reference = self.reference(pack) if self.reference else None  # log π_ref(c|x), log π_ref(r|x)
            policy = pair_logps(self.model, pack)  # log π(c|x), log π(r|x)
            lengths = side_lengths(pack)  # |c|, |r|
            terms = self.loss(policy, reference, lengths)
            self.backward_sum(terms.loss_B.sum(), batch.denominator)
            self._count(totals, pack, pair_metrics(policy, reference, lengths, terms))
        norm = self.update(self.optimizer, self.optimizers(), self.model.parameters())
        self.finish_step({**totals.compute(), "grad_norm": norm})

    def _totals(self) -> PairMetrics:
        names = (*METRICS, *(KL if self.reference else ()))
        return over_rows(PairMetrics(names, self._data.source_names, names), self._trainer).to(self.device)

    def _count(self, totals: PairMetrics, pack: Pack, values: dict[str, Tensor]) -> None:
        if pack.rows:  # a filler counts for nothing
            sources_B = self._data.source_numbers[list(pack.rows)]
            totals.update(values, sources_B, pack.tokens_T.numel() - pack.padding, pack.target_N.numel())

    # Validation -------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Count anew."""
        self.validation = over_rows(PairMetrics(VALIDATED), self._trainer).to(self.device)

    def validation_step(self, batch: StepBatch, batch_idx: int) -> None:
        """The same numbers without an update: `val_loss`, `val_accuracy`, `val_margin` over all validation pairs."""
        assert self.validation is not None
        for pack in batch.packs:
            reference = self.reference(pack, "validation") if self.reference else None
            policy, lengths = pair_logps(self.model, pack), side_lengths(pack)
            values = pair_metrics(policy, reference, lengths, self.loss(policy, reference, lengths))
            self.validation.update(values, [0] * len(pack.rows), 0, 0)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all ranks."""
        assert self.validation is not None
        values = self.validation.compute()
        self.log_validation({f"val_{name}": values[name] for name in VALIDATED})

    # The reference ----------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """The policy, and the start model where it is asked at every step."""
        super().configure_model()
        if self.reference:
            self.reference.build()

    def check_data(self, data: Any) -> None:
        """Refuse rows that the model cannot read or that are not pairs, and a reference of other weights."""
        super().check_data(data)
        check_tokenizer(data, self.start)
        check_pairs(data)
        if self.reference:
            self.reference.check(self._documents())

    def on_train_start(self) -> None:
        """Have the reference before the first step: after it, the start weights are gone."""
        if self.reference:
            self.reference.prepare(self._documents())

    def on_validation_start(self) -> None:
        """The same; Lightning may validate before it trains, or only validate."""
        if self.reference:
            documents = self._documents()
            fits = self.trainer.state.fn == "fit"
            self.reference.prepare(documents if fits else {"validation": documents["validation"]})

    @property
    def keeps_rows(self) -> bool:  # type: ignore[override]  known once the loss is
        """Numbers about single rows that cannot be had again: those of a cached reference, but for LoRA's frozen base."""
        cached = self.reference is not None and self.reference.settings.mode == "cached"
        return cached and self.backbone.lora is None

    def _documents(self) -> dict[str, Documents]:
        return dict(zip(("train", "validation"), self._data.document_sets, strict=False))

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    # Checkpoints ------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The loss; where the reference comes from changes nothing of what it is."""
        return {"loss": self.loss}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the reference's numbers of all rows (8 bytes each): a run that goes on could not compute them again."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference"] = self.reference.state() if self.reference else {}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the reference of the run's start."""
        super().on_load_checkpoint(checkpoint)
        if self.reference:
            self.reference.load(checkpoint.get("reference", {}))
