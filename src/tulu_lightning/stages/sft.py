"""Supervised fine-tuning (Tülu 3, section 4)."""

from typing import Any

import torch
from torch import Tensor

from tulu_lightning.core.noise import embedding_noise
from tulu_lightning.core.reduce import Reduction, document_of, reduced_weights
from tulu_lightning.core.settings import require
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.ranks import over_rows
from tulu_lightning.stages.mean import Mean
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.sft_metrics import SourceLoss
from tulu_lightning.stages.stage import Stage
from tulu_lightning.types import Pack, StepBatch

__all__ = ["SFT"]


class SFT(Stage):
    """Next-token loss on the assistant's tokens.

    The loss of a step is a weighted sum of -log p over all its trained tokens, over all ranks and micro-batches, divided
    once. `reduction` says by what; none of them depends on how the step is cut:

    - `token_mean`: by the total weight of the step's trained tokens, so that every one of them counts alike.
    - `sum`: by the step's rows. This is the paper's sum loss: the release summed over the tokens of a micro-batch, which
      held one row, and averaged over ranks and accumulation. All tokens weigh alike here, too; the gradient is
      `token_mean`'s times the step's trained tokens per row. Adam divides that out but for clipping and `eps`.
    - `sequence_mean`: each row's own mean, then the mean over the step's rows, so a token of a short answer weighs more.
      A row without trained tokens counts with 0.

    The paper (section 4.3.2) found that a mean per forward pass, averaged over accumulation steps and ranks, weighs
    tokens by how the batch is cut, and that the sum did better at each learning rate it tried.

    Args:
        backbone: what to start from.
        optimizer: AdamW and schedule.
        reduction: see above.
        neftune_alpha: noise on the embeddings in training, uniform in ±alpha / √(tokens of the row · width) (Jain et
            al. 2023); 0 is none. Drawn from (data.seed, step, row): a run that goes on or is cut otherwise has the same.

    Raises:
        InputError: an unknown reduction, or an alpha below 0.
    """

    def __init__(
        self, backbone: Backbone, optimizer: AdamW, reduction: Reduction = "token_mean", neftune_alpha: float = 0.0
    ) -> None:
        super().__init__(backbone, optimizer)
        known = ("token_mean", "sum", "sequence_mean")
        require(reduction in known, "model.reduction", repr(reduction), f"Use one of {', '.join(known)}.")
        require(0 <= neftune_alpha < float("inf"), "model.neftune_alpha", neftune_alpha, "Use 0 for none, or more.")
        self.reduction: Reduction = reduction
        self.neftune_alpha = neftune_alpha
        self.val_loss = Mean()

    def settings(self) -> dict[str, Any]:
        """Reduction and noise."""
        return {"reduction": self.reduction, "neftune_alpha": self.neftune_alpha}

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """One global step: every micro-batch forward and backward, then one update."""
        denominator = self._denominator(batch)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        totals = over_rows(SourceLoss([source.name for source in data.sources]), self._trainer).to(self.device)
        for pack in batch.packs:
            weight_N = self._weights(pack)
            with self.accumulating():  # around the forward, too, which makes the head's gradient
                stats = self.model(pack, weight_N=weight_N / denominator, noise_TD=self._noise(pack, batch.step))
                assert stats.nll is not None
                self.backward_sum(stats.nll, 1.0)  # the weights hold the division already
            totals.update(pack, stats.logp_N, weight_N, [data.source_of(row) for row in pack.rows])
        norm = self.update(self.optimizer, self.optimizers(), self.model.parameters())
        values = totals.compute()
        loss = values.pop("sum") / denominator
        self.finish_step({"loss": loss, **values, "grad_norm": norm})

    def _denominator(self, batch: StepBatch) -> float:
        if not batch.denominator:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            rows = ", ".join(f"{row} of {data.source_of(row)!r}" for row in batch.rows[:3])
            what = f"no token of step {batch.step} is trained (rows {rows}{' …' if len(batch.rows) > 3 else ''})"
            raise InputError("data", what, "Leave out rows whose answers all have weight 0, or take more rows a step.")
        return batch.denominator if self.reduction == "token_mean" else float(len(batch.rows))

    def _weights(self, pack: Pack) -> Tensor:
        if self.reduction != "sequence_mean":
            return pack.weight_N
        documents_S = torch.tensor(document_of(pack.spans), device=pack.segment_N.device)
        return reduced_weights(pack.weight_N, documents_S[pack.segment_N], self.reduction)

    def _noise(self, pack: Pack, step: int) -> Tensor | None:
        if not self.neftune_alpha:
            return None
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        table: Any = self.model.lm.get_input_embeddings()
        width = table.weight.shape[1]
        return embedding_noise(pack, width, self.neftune_alpha, data.seed, step).to(pack.tokens_T.device)

    def validation_step(self, batch: StepBatch, batch_idx: int) -> None:
        """The loss per trained token without an update, over all batches and ranks: `val_loss`."""
        for pack in batch.packs:
            if float(weight := pack.weight_N.sum()):
                loss = self.model(pack, weight_N=pack.weight_N).nll
                self.val_loss.update(loss / weight, weight)
            else:  # a filler: the pass is for the collectives
                self.model(pack, weight_N=pack.weight_N)
        self.log_validation({"val_loss": self.val_loss})
