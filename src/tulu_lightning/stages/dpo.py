"""Direct preference optimisation, length-normalised by default (Tülu 3, section 5)."""

import io
from typing import Any

import torch
from torch import Tensor

from tulu_lightning.core.preference import DPO as DPOLoss
from tulu_lightning.core.preference import Pair, PreferenceLoss
from tulu_lightning.core.reduce import segment_sum
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.progress import Progress
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.stage import Stage
from tulu_lightning.types import Pack, StepBatch

__all__ = ["DPO"]

SUMS = ("loss", "rewards_chosen", "rewards_rejected", "accuracy", "length_chosen", "length_rejected")
"""Metrics that are means over the step's pairs, in the order of `_pack_step`; after them come two counts."""
COUNTS = ("tokens", "trained_tokens")
PAIR = 3
"""Segments of a pair's document: the prompt, then chosen and rejected as its children."""


class DPO(Stage):
    """DPO on pairs whose prompt is computed once.

    The reference's log-probs are those of the start weights: computed once for every row before the first step, kept
    by row (order, packing and ranks do not matter) and carried in the checkpoint.
    """

    keeps_rows = True

    def __init__(self, backbone: Backbone, optimizer: AdamW, loss: PreferenceLoss | None = None) -> None:
        super().__init__(backbone, optimizer)
        self.loss = loss or DPOLoss()
        self.reference_logps: Tensor | None = None

    def sums(self, pack: Pack) -> Pair:
        """Summed log-probs of chosen and rejected answers, in the order of the pack's pairs."""
        sums_S = segment_sum(self.model(pack).logp_N, pack.segment_N, len(pack.spans))
        return Pair(sums_S[1::PAIR], sums_S[2::PAIR])

    def lengths(self, pack: Pack) -> Pair:
        """Scored tokens of both answers."""
        counts_S = segment_sum(torch.ones_like(pack.weight_N), pack.segment_N, len(pack.spans))
        return Pair(counts_S[1::PAIR], counts_S[2::PAIR])

    def on_train_start(self) -> None:
        """Compute the reference log-probs, unless a checkpoint brought them."""
        if self.reference_logps is None:
            self.reference_logps = self._reference()

    @torch.no_grad()
    def _reference(self) -> Tensor:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        total = len(data.documents)
        logps = torch.full((total, 2), float("nan"))
        done, stream = 0, None if self.trainer.is_global_zero else io.StringIO()  # one rank speaks for all
        with Progress("DPO reference", total, stream=stream) as progress:
            for pack in data.packs(range(total), data.micro_tokens):
                pack = self.trainer.strategy.batch_to_device(pack)
                logps[list(pack.rows)] = torch.stack(list(self.sums(pack)), 1).float().cpu()
                done += len(pack.rows)
                progress.update(done)
        return logps

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """One global step over all its pairs."""
        sums = torch.zeros(len(SUMS + COUNTS), dtype=torch.float64)
        for pack in batch.packs:
            sums += self._pack_step(pack, batch.denominator)
        norm = self.update(self.optimizer, self.optimizers(), self.model.parameters())
        values = dict(zip(SUMS + COUNTS, self.reduce_sum(sums).tolist(), strict=True))
        metrics = {name: values[name] / batch.denominator for name in SUMS}
        metrics["margin"] = metrics["rewards_chosen"] - metrics["rewards_rejected"]
        self.finish_step({**metrics, **{name: values[name] for name in COUNTS}, "grad_norm": norm})

    def _pack_step(self, pack: Pack, denominator: float) -> Tensor:
        lengths, policy = self.lengths(pack), self.sums(pack)
        if not pack.rows:  # filler: the passes are for the collectives, the loss is nothing
            self.backward_sum(0.0 * policy.chosen_B.sum(), denominator)
            return torch.zeros(len(SUMS + COUNTS), dtype=torch.float64)
        assert self.reference_logps is not None
        reference = Pair(*self.reference_logps[list(pack.rows)].to(policy.chosen_B).unbind(1))
        terms = self.loss(policy, reference, lengths)
        self.backward_sum(terms.loss_B.sum(), denominator)
        right_B = (terms.rewards.chosen_B > terms.rewards.rejected_B).float()
        per_pair = (terms.loss_B.detach(), *terms.rewards, right_B, *lengths)
        counts = [pack.tokens_T.numel() - pack.padding, pack.target_N.numel()]
        return torch.tensor([*(float(x.sum()) for x in per_pair), *counts], dtype=torch.float64)

    def settings(self) -> dict[str, Any]:
        """The loss."""
        return {"loss": self.loss}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the reference: after the first step the start weights are gone."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference_logps"] = self.reference_logps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the reference of the run's start."""
        super().on_load_checkpoint(checkpoint)
        self.reference_logps = checkpoint["reference_logps"]
