"""SFT's head loss: on a CPU ours with the compiled softmax; on CUDA ours, ours with its softmax compiled, or Liger's.

There the fastest one that is right, asked once, at the first micro-batch: all run on it with uneven token weights (older
Liger releases sum them wrongly in backward); another one than ours is taken if loss and gradients agree and its last run
takes less time. What was chosen is printed. A choice by timing may fall otherwise when a run goes on, so two starts agree
to rounding only.

Seen on an H100 (12,500 tokens, 128,256 words, another job beside it): Liger's 111 ms, ours 114. The compiled one has run
on no GPU yet.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from tulu_lightning.core.nll import WeightedNll, compiled_finish, weighted_nll
from tulu_lightning.models.compiled import head_kernels

__all__ = ["Loss", "choose", "head_loss"]

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], WeightedNll]
TOLERANCE = 0.02
"""Relative distance of loss and gradients; products in bf16 leave some thousandths."""
WORTH_COMPILING = 1 << 26
"""Logits of a micro-batch from which on the compiler is asked: it takes some seconds."""


def head_loss(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor) -> Loss:
    """`weighted_nll`, or what is faster. The tensors are the first micro-batch's, and are not changed."""
    if (compiled := head_kernels(hidden_ND, head_VD)) is not None:  # no trial by time, which may fall otherwise
        return partial(weighted_nll, finish=compiled.softmax_less_)
    if hidden_ND.device.type != "cuda" or not len(target_N):
        return weighted_nll
    others: dict[str, Loss] = {}
    if len(target_N) * len(head_VD) >= WORTH_COMPILING:
        others["ours, compiled"] = partial(weighted_nll, finish=compiled_finish)
    if (liger := _liger()) is not None:
        others["liger"] = liger
    return choose(weighted_nll, others, hidden_ND, head_VD, target_N)


def _liger() -> Loss | None:
    try:
        from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
            liger_fused_linear_cross_entropy as fused,
        )
    except ImportError:
        return None

    def liger(hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, weight_N: Tensor) -> WeightedNll:
        head_VD = head_VD.to(hidden_ND.dtype)
        nll_N: Any = fused(hidden_ND, head_VD, target_N, reduction="none", accum_dtype=torch.float32)
        return WeightedNll((weight_N * nll_N).sum(), -nll_N.detach())

    return liger


def choose(ours: Loss, others: Mapping[str, Loss], hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor) -> Loss:
    """The fastest of those that agree with ours; ours if none does, or if the others fail."""
    if not others:
        return ours
    generator = torch.Generator().manual_seed(0)
    weight_N = (0.5 + torch.rand(len(target_N), generator=generator)).to(hidden_ND.device)
    own, least = _trial(ours, hidden_ND, head_VD, target_N, weight_N)
    told, taken, name = [f"ours {least * 1e3:.1f} ms"], ours, "ours"
    for label, other in others.items():
        try:
            found, seconds = _trial(other, hidden_ND, head_VD, target_N, weight_N)
            apart = max(float((a - b).norm() / a.norm()) for a, b in zip(own, found, strict=True))
        except Exception as error:  # whatever a foreign kernel or a compiler raises: ours is there
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            told.append(f"{label} failed ({type(error).__name__}: {reason})")
            continue
        told.append(f"{label} {seconds * 1e3:.1f} ms, loss and gradients {apart:.1g} apart")
        if apart <= TOLERANCE and seconds < least:
            least, taken, name = seconds, other, label
    rank_zero_info(f"head loss: {name} ({'; '.join(told)})")
    return taken


def _trial(
    loss: Loss, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, weight_N: Tensor
) -> tuple[list[Tensor], float]:
    """Loss and gradients, and the seconds of the last run; those before it may compile."""
    results: list[Tensor] = []
    started = 0.0
    for _ in range(3):
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in (hidden_ND, head_VD)]
        float(weight_N.sum())  # waits for the device
        started = time.perf_counter()
        value = loss(leaves[0], leaves[1], target_N, weight_N).loss
        value.backward()
        results = [value.detach().float(), *(leaf.grad.float() for leaf in leaves if leaf.grad is not None)]
        float(sum(result.sum() for result in results))
    return results, time.perf_counter() - started
