"""The reward model's loss: from the rewards of two answers to a loss per pair."""

import torch.nn.functional as F
from torch import Tensor

from tulu_lightning.core.preference import Pair

__all__ = ["bradley_terry"]


def bradley_terry(rewards: Pair) -> Tensor:
    """-log σ(r_c - r_r) (Bradley and Terry 1952; Tülu 3, table 36).

    Only the difference counts: rewards have no zero, and their unit is the log of the odds that the chosen answer wins.

    Args:
        rewards: of both answers of each pair.

    Returns:
        loss_B; the caller sums and divides once, by the step's pairs.

    Example: rewards 1 and 0 give log(1 + e⁻¹) = 0.3133; equal ones give log 2.
    """
    return -F.logsigmoid(rewards.chosen_B - rewards.rejected_B)
