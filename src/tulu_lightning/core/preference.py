"""Preference losses: from summed log-probs of chosen and rejected answers to a loss per pair.

The losses take plain sums and lengths, so that length normalisation is a visible term of the formula and the
reference log-probs do not depend on which loss reads them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tulu_lightning.core.settings import require

__all__ = ["DPO", "Pair", "PairLoss"]


class Pair(NamedTuple):
    """One number per pair for each side."""

    chosen_B: Tensor
    rejected_B: Tensor


class PairLoss(NamedTuple):
    """What a preference loss says of each pair; the caller sums and divides once, by the step's pairs."""

    loss_B: Tensor
    rewards: Pair
    """Implicit rewards, detached."""


@dataclass(frozen=True)
class DPO:
    """Logistic loss on the difference of two implicit rewards (Tülu 3, eq. 6; Rafailov et al. 2023, eq. 7).

    `loss = -log σ(r_c - r_r)` with `r = β (log π - log π_ref)`, each divided by the answer's tokens when
    `length_normalised` (Tülu 3's `dpo_norm`).
    """

    beta: float = 5.0
    """Sharpness of the implicit reward. 5 belongs to length-normalised log-probs; summed ones want about 0.1."""
    length_normalised: bool = True
    """Divide each answer's log-ratio by its number of scored tokens."""

    def __post_init__(self) -> None:
        require(0 < self.beta < float("inf"), "loss.beta", self.beta, "It must be above 0.")

    def __call__(self, policy: Pair, reference: Pair, lengths: Pair) -> PairLoss:
        """Loss per pair.

        Args:
            policy: summed log-probs of both answers under the policy, in nats.
            reference: the same under the frozen start model.
            lengths: scored tokens of both answers.
        """
        chosen_B, rejected_B = (
            self.beta * (ours - theirs) / (tokens if self.length_normalised else torch.ones_like(tokens))
            for ours, theirs, tokens in zip(policy, reference, lengths, strict=True)
        )
        return PairLoss(-F.logsigmoid(chosen_B - rejected_B), Pair(chosen_B.detach(), rejected_B.detach()))
