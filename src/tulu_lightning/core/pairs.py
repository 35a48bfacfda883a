"""Numbers of pairs: one for each side, summed from what a pack says of its tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from tulu_lightning.core.reduce import PAIR, pair_sum
from tulu_lightning.types import Pack

__all__ = ["Pair", "side_lengths", "side_sums"]


class Pair(NamedTuple):
    """One number per pair for each side."""

    chosen_B: Tensor
    rejected_B: Tensor


def side_sums(values_N: Tensor, pack: Pack) -> Pair:
    """Sums over both sides of each of a pack's pairs, of one number per scored token; of a filler there are none."""
    sides = pair_sum(values_N, pack.segment_N, len(pack.spans) // PAIR)
    return Pair(*(side_B[: len(pack.rows)] for side_B in sides))


def side_lengths(pack: Pack) -> Pair:
    """Scored tokens of both sides of each of a pack's pairs; those of the common start count for both."""
    return side_sums(torch.ones_like(pack.weight_N), pack)
