"""Sums over segments: from one number per token to one number per response or row."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tulu_lightning.types import Span

__all__ = ["PAIR", "Reduction", "document_of", "pair_sum", "reduced_weights", "segment_sum"]

Reduction = Literal["token_mean", "sum", "sequence_mean"]
PAIR = 3
"""Segments of a pair's document: what both sides begin with, then the rest of chosen and of rejected."""


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


def pair_sum(values_N: Tensor, segment_N: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Sum per-token values over both sides of pairs whose common start is computed once.

    A pair is `PAIR` segments. Scored tokens of the first one (answers of earlier turns, or the words with which both
    answers begin) belong to both sides.

    Args:
        values_N: one number per scored token.
        segment_N: int64, the segment of each.
        pairs: number of pairs B.

    Returns:
        chosen_B and rejected_B.

    Example: values [1, 2, 4], segments [0, 1, 2], one pair: chosen 3, rejected 5.
    """
    sums_B3 = segment_sum(values_N, segment_N, PAIR * pairs).view(-1, PAIR)
    return sums_B3[:, 0] + sums_B3[:, 1], sums_B3[:, 0] + sums_B3[:, 2]


def document_of(spans: Sequence[Span]) -> list[int]:
    """For each segment of a pack, the index of its document.

    Example: a pair (prompt, two answers) and a plain row: [0, 0, 0, 1].
    """
    result: list[int] = []
    for span in spans:
        result.append((result[-1] if result else -1) + (span.parent < 0))
    return result


def reduced_weights(weight_N: Tensor, document_N: Tensor, reduction: Reduction) -> Tensor:
    """What each token's -log p is multiplied by, before the division by the step's denominator.

    Args:
        weight_N: loss weight of each scored token.
        document_N: int64, the document (row) of each.
        reduction: `token_mean` and `sum` leave the weights as they are and differ in the denominator alone;
            `sequence_mean` divides them by their sum over the token's row.

    Returns:
        weights_N; 0 stays 0, also in a row that has no other.
    """
    if reduction != "sequence_mean" or not len(weight_N):
        return weight_N
    sums_B = segment_sum(weight_N, document_N, int(document_N[-1]) + 1)
    return torch.where(weight_N > 0, weight_N / sums_B[document_N], 0.0)
