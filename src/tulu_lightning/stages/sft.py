"""Supervised fine-tuning (Tülu 3, section 4)."""

from typing import Any

import torch

from tulu_lightning.stages.stage import Stage
from tulu_lightning.types import StepBatch

__all__ = ["SFT"]


class SFT(Stage):
    """Next-token loss on the assistant's tokens.

    The loss of a step is the weighted sum of -log p over all its trained tokens, divided by their total weight over
    all ranks and micro-batches: every trained token of the step counts alike (the paper's section 4.3.2 shows what a
    mean per micro-batch does instead).
    """

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """One global step: every micro-batch forward and backward, then one update."""
        sums = torch.zeros(3, dtype=torch.float64)
        for pack in batch.packs:
            logp_N = self.model(pack).logp_N
            loss = -(pack.weight_N * logp_N).sum()
            self.backward_sum(loss, batch.denominator)
            trained = int((pack.weight_N > 0).sum())
            sums += torch.tensor(
                [float(loss.detach()), pack.tokens_T.numel() - pack.padding if pack.rows else 0, trained]
            )
        norm = self.update(self.optimizer, self.optimizers(), self.model.parameters())
        loss_sum, tokens, trained = self.reduce_sum(sums).tolist()
        self.finish_step(
            {"loss": loss_sum / batch.denominator, "tokens": tokens, "trained_tokens": trained, "grad_norm": norm}
        )

    def validation_step(self, batch: StepBatch, batch_idx: int) -> Any:
        """The same loss without an update, logged as `val_loss`."""
        loss = sum(float(-(pack.weight_N * self.model(pack).logp_N).sum()) for pack in batch.packs)
        value = float(self.reduce_sum(torch.tensor([loss]))) / batch.denominator
        self.log("val_loss", value, batch_size=len(batch.rows))
