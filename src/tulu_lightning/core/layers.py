"""A Llama's two layers of elementwise work, with gradients that keep little: for CPUs, where memory traffic is time.

PyTorch's autograd keeps every intermediate result of a norm or a gated MLP, in fp32 under autocast, and passes over
memory once for each. Here a norm keeps its input and one number a token, an MLP its input and two projections; the rest
is computed again in backward, in place. The arithmetic is that of transformers' Llama, and the norm's is fp32.

The gated MLP: down(silu(gate(x)) · up(x)). With s = sigmoid(g): d silu / dg = s · (1 + g · (1 - s)).
The norm (Zhang and Sennrich 2019): y = w · x · r, r = (mean(x²) + eps)^-1/2.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tulu_lightning.core.matmul import product

__all__ = ["gated_mlp", "rms_norm"]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        return (wide * scale).mul_(weight_D).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_D, scale = ctx.saved_tensors
        width = x.shape[-1]
        normed = x.to(scale.dtype) * scale
        grad = grads[0].to(scale.dtype)
        along = grad * normed
        grad_weight = along.reshape(-1, width).sum(0) if ctx.needs_input_grad[1] else None
        mean = (along.reshape(-1, width) @ weight_D.to(scale.dtype)).div_(width).view(scale.shape)
        grad_x = torch.addcmul(grad * weight_D, normed, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Root-mean-square norm over the last axis, in fp32 inside.

    Args:
        x: [..., D].
        weight_D: scale of each column.
        eps: added to the mean square.
        dtype: of the result; what reads it would round it anyway.
    """
    return _RmsNorm.apply(x, weight_D, eps, dtype)  # type: ignore[return-value]


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        low: tuple[Tensor, Tensor, Tensor],
        recompute: bool,
    ) -> Tensor:
        g_MF, u_MF = product(x_MD, low[0]), product(x_MD, low[1])
        # The parameters, not their low copies: these are made again in backward, which costs less than keeping them.
        ctx.save_for_backward(x_MD, gate, up, down, *(() if recompute else (g_MF, u_MF)))
        activated_MF = F.silu(g_MF, inplace=recompute)
        return product(activated_MF.mul_(u_MF), low[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_MD, *saved = ctx.saved_tensors  # read once: activation checkpointing allows no second time
        dtype = saved[0].dtype
        gate, up, down = (weight.to(x_MD.dtype) for weight in saved[:3])
        g_MF, u_MF = saved[3:] or (product(x_MD, gate), product(x_MD, up))
        need_x, *need = ctx.needs_input_grad[:4]
        grad_MD = grads[0].contiguous()
        activated = F.silu(g_MF)
        grad_down = product(grad_MD.T, (activated * u_MF).T).to(dtype) if need[2] else None
        grad_h = product(grad_MD, down.T)
        grad_u = activated.mul_(grad_h)
        grad_g = torch.ops.aten.silu_backward(grad_h.mul_(u_MF), g_MF)
        grad_gate = product(grad_g.T, x_MD.T).to(dtype) if need[0] else None
        grad_up = product(grad_u.T, x_MD.T).to(dtype) if need[1] else None
        grad_x = product(grad_g, gate.T).add_(product(grad_u, up.T)) if need_x else None
        return grad_x, grad_gate, grad_up, grad_down, None, None


def gated_mlp(
    x: Tensor, weights: tuple[Tensor, Tensor, Tensor], low: tuple[Tensor, Tensor, Tensor], recompute: bool = False
) -> Tensor:
    """down(silu(gate(x)) · up(x)).

    Args:
        x: [..., D].
        weights: the parameters gate [F, D], up [F, D] and down [D, F], which get the gradients.
        low: the same in the dtype of `x`; the parameters themselves where that is theirs.
        recompute: keep only `x`, and compute gate(x) and up(x) again in backward: 11 products in place of 9.
    """
    parts = tuple(part.detach() for part in low)
    out = _GatedMlp.apply(x.reshape(-1, x.shape[-1]), *weights, parts, recompute)
    return out.view(x.shape)  # type: ignore[union-attr]
