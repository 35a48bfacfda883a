"""Liger's fused head loss in place of ours, on CUDA, where it is installed, right and faster.

Asked once, at the first micro-batch: both run on it with uneven token weights (older Liger releases sum them wrongly in
backward); Liger's is taken if loss and gradients agree and its second run takes less time. What was chosen is printed.
A choice by timing may fall otherwise when a run goes on, so two starts agree to rounding only. Not run on a GPU yet:
the choice is tested with stand-ins.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from tulu_lightning.core.nll import WeightedNll, weighted_nll

__all__ = ["Loss", "choose", "head_loss"]

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], WeightedNll]
TOLERANCE = 0.02
"""Relative distance of loss and gradients; products in bf16 leave some thousandths."""


def head_loss(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor) -> Loss:
    """`weighted_nll`, or Liger's. The tensors are the first micro-batch's, and are not changed."""
    if hidden_ND.device.type != "cuda" or not len(target_N):
        return weighted_nll
    try:
        from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
            liger_fused_linear_cross_entropy as fused,
        )
    except ImportError:
        return weighted_nll

    def liger(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, weight_N: Tensor) -> WeightedNll:
        head_VD = head_VD.to(hidden_ND.dtype)
        nll_N: Any = fused(hidden_ND, head_VD, target_N, reduction="none", accum_dtype=torch.float32)
        return WeightedNll((weight_N * nll_N).sum(), -nll_N.detach())

    return choose(weighted_nll, liger, hidden_ND, head_VD, target_N)


def choose(ours: Loss, theirs: Loss, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor) -> Loss:
    """The faster of two, if they agree; ours if not, or if theirs fails."""
    generator = torch.Generator().manual_seed(0)
    weight_N = (0.5 + torch.rand(len(target_N), generator=generator)).to(hidden_ND.device)
    try:
        (own, own_seconds), (other, seconds) = (
            _trial(f, hidden_ND, head_VD, target_N, weight_N) for f in (ours, theirs)
        )
        distances = [float((a - b).norm() / a.norm()) for a, b in zip(own, other, strict=True)]
    except Exception as error:  # whatever a foreign kernel raises: ours is there
        rank_zero_info(f"head loss: ours; liger's failed ({type(error).__name__}: {error})")
        return ours
    taken = all(distance <= TOLERANCE for distance in distances) and seconds < own_seconds
    rank_zero_info(
        f"head loss: {'liger' if taken else 'ours'} (liger {seconds * 1e3:.1f} ms, ours {own_seconds * 1e3:.1f} ms, "
        f"loss and gradients {max(distances):.1g} apart)"
    )
    return theirs if taken else ours


def _trial(
    loss: Loss, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, weight_N: Tensor
) -> tuple[list[Tensor], float]:
    """Loss and gradients, and the seconds of the second run; the first one may compile."""
    results: list[Tensor] = []
    started = 0.0
    for _ in range(2):
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in (hidden_ND, head_VD)]
        float(weight_N.sum())  # waits for the device
        started = time.perf_counter()
        value = loss(leaves[0], leaves[1], target_N, weight_N).loss
        value.backward()
        results = [value.detach().float(), *(leaf.grad.float() for leaf in leaves if leaf.grad is not None)]
        float(sum(result.sum() for result in results))
    return results, time.perf_counter() - started
