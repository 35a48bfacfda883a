"""The reward model (Tülu 3, sections 5 and 6.2, table 36): which of two answers is the better one, as a number each."""

from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from tulu_lightning.core.pairs import Pair, side_lengths
from tulu_lightning.core.preference import reward_metrics
from tulu_lightning.core.reduce import PAIR
from tulu_lightning.core.reward import bradley_terry
from tulu_lightning.core.settings import require
from tulu_lightning.data.preference import PreferenceData
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.models.heads import PackedReward, has_reward_head
from tulu_lightning.ranks import over_rows
from tulu_lightning.stages.checks import check_pairs, check_tokenizer
from tulu_lightning.stages.mean import Mean
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.pair_metrics import PairMetrics
from tulu_lightning.stages.stage import Stage
from tulu_lightning.types import Pack, StepBatch

__all__ = ["RewardModel"]

VALIDATED = ("loss", "accuracy", "margin")
"""Means over pairs that a validation reports."""
NAMES = (*VALIDATED, "rewards_chosen", "rewards_rejected", "length_chosen", "length_rejected")
"""Those that a step reports, of each source as well."""


class RewardModel(Stage):
    """Bradley-Terry on pairs: a scalar head reads the last token of each side, which has seen all before it.

    What both sides begin with is computed once. The output head of the language model is left out; an export is a
    one-label sequence classifier, which can start PPO's critic, or another run of this stage.

    Args:
        backbone: what to start from: a language model, which gets a fresh head, or a reward model, whose head goes on.
        optimizer: AdamW and schedule.
        head_seed: of a fresh head's random numbers.

    Raises:
        InputError: the start is a classifier that is no reward model of this kind, or brings a head and `head_seed` is
            set.
    """

    speaks: ClassVar[bool] = False

    def __init__(self, backbone: Backbone, optimizer: AdamW, head_seed: int = 0) -> None:
        super().__init__(backbone, optimizer)
        self.head_seed = head_seed
        self._goes_on = has_reward_head(self.folder, backbone.layers)
        remedy = f"The head of {self.start} goes on: leave it out."
        require(not (self._goes_on and head_seed), "model.head_seed", head_seed, remedy)
        self.validated = nn.ModuleDict({name: Mean() for name in VALIDATED})

    def build(self) -> PackedReward:
        """Decoder and head."""
        what = "the reward model's head goes on" if self._goes_on else "a language model, with a fresh head"
        rank_zero_info(f"RewardModel starts from {self.start}: {what}")
        return PackedReward(self.backbone, self.folder, self.head_seed)

    def settings(self) -> dict[str, Any]:
        """The seed of a fresh head."""
        return {"head_seed": self.head_seed}

    def check_data(self, data: Any) -> None:
        """Pairs whose tokens the model can read."""
        if not isinstance(data, PreferenceData):
            what = f"is {type(data).__name__}"
            raise InputError("data", what, "RewardModel compares two answers: use PreferenceData.")
        super().check_data(data)
        check_tokenizer(data, self.start)
        check_pairs(data)

    def rewards(self, pack: Pack) -> Pair:
        """Rewards of both sides, in the order of the pack's pairs."""
        rewards_S = self.model(pack)
        return Pair(rewards_S[1::PAIR], rewards_S[2::PAIR])  # padding, if any, stands at a multiple of three

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """One global step: every micro-batch forward and backward, then one update."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        metrics = over_rows(PairMetrics(NAMES, data.source_names, NAMES), self._trainer).to(self.device)
        for pack in batch.packs:
            rewards = self.rewards(pack)
            loss_B = bradley_terry(rewards)
            if not pack.rows:  # filler: the passes are for the collectives, the loss is nothing
                self.backward_sum(0.0 * loss_B.sum(), batch.denominator)
                continue
            self.backward_sum(loss_B.sum(), batch.denominator)
            lengths = side_lengths(pack)
            values = reward_metrics(rewards, loss_B)
            values |= {"length_chosen": lengths.chosen_B, "length_rejected": lengths.rejected_B}
            sources_B = data.source_numbers[list(pack.rows)]
            metrics.update(values, sources_B, pack.tokens_T.numel() - pack.padding, pack.target_N.numel())
        norm = self.update(self.optimizer, self.optimizers(), self.model.parameters(), "reward model")
        self.finish_step({**metrics.compute(), "grad_norm": norm})

    def validation_step(self, batch: StepBatch, batch_idx: int) -> None:
        """The same without an update, over all pairs of all batches and ranks: `val_loss`, `val_accuracy`, `val_margin`."""
        for pack in batch.packs:
            rewards = self.rewards(pack)
            if pack.rows:  # else a filler: the pass was for the collectives
                values = reward_metrics(rewards, bradley_terry(rewards))
                for name in VALIDATED:
                    self._validated(name).update(values[name])
        self.log_validation({f"val_{name}": self._validated(name) for name in VALIDATED})

    def _validated(self, name: str) -> Any:
        return self.validated[name]
