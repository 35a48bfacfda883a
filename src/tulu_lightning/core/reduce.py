"""Sums over segments: from one number per token to one number per response."""

import torch
from torch import Tensor

__all__ = ["segment_sum"]


def segment_sum(values_N: Tensor, segment_N: Tensor, segments: int) -> Tensor:
    """Sum per-token values by segment.

    Args:
        values_N: one number per scored token.
        segment_N: int64, the segment of each.
        segments: number of segments S.

    Returns:
        values_S; 0 for a segment without scored tokens.

    Example: values [1, 2, 4], segments [1, 1, 2], S = 3 gives [0, 3, 4].
    """
    return torch.zeros(segments, dtype=values_N.dtype, device=values_N.device).index_add(0, segment_N, values_N)
