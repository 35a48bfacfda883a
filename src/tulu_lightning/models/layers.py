"""A Llama's two layers of elementwise work, with gradients that keep little: for CPUs, where memory traffic is time.

PyTorch's autograd keeps every intermediate result of a norm or a gated MLP, in fp32 under autocast, and passes over
memory once for each. Here a norm keeps its input and one number a token, an MLP its input and two projections; the rest
is computed again in backward, in place. The arithmetic is that of transformers' Llama, and the norm's is fp32. Where
`models.compiled` has functions for it, each of them passes over memory once.

The gated MLP: down(silu(gate(x)) · up(x)). With s = sigmoid(g): d silu / dg = s · (1 + g · (1 - s)).
The norm (Zhang and Sennrich 2019): y = w · x · r, r = (mean(x²) + eps)^-1/2.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tulu_lightning.core.gradients import room_for
from tulu_lightning.core.matmul import product, weight_gradient
from tulu_lightning.models.compiled import LANES, NORMS, LayerKernels, layer_kernels, takes

__all__ = ["embed", "gated", "gated_mlp", "rms_norm", "rotary"]


def _compiled(width: int, *tensors: Tensor) -> LayerKernels | None:
    """The compiled functions, where they can be handed these tensors, whose rows are of this width."""
    return layer_kernels() if width % LANES == 0 and takes(*tensors) else None


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table_VD: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids, table_VD)
        ctx.padding = padding
        return F.embedding(ids, table_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ids, table_VD = ctx.saved_tensors
        ids_N, grad_ND = ids.reshape(-1), grads[0].reshape(-1, table_VD.shape[1])
        if ctx.padding is not None:
            grad_ND = grad_ND * (ids_N != ctx.padding)[:, None]
        room_VD = room_for(table_VD)
        grad_VD = torch.zeros_like(table_VD) if room_VD is None else room_VD
        grad_VD.index_add_(0, ids_N, grad_ND.to(grad_VD.dtype))
        return None, grad_VD if room_VD is None else None, None


def embed(ids: Tensor, table_VD: Tensor, padding: int | None = None) -> Tensor:
    """Rows of a table, whose gradient goes where `core.gradients` says.

    Args:
        ids: int64 [...].
        table_VD: one row a token.
        padding: id whose row gets no gradient, as `torch.nn.Embedding` has it.

    Returns:
        [..., D].
    """
    return _Embed.apply(ids, table_VD, padding)  # type: ignore[return-value]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        ctx.compiled = _compiled(x.shape[-1], x, weight_D) if (x.dtype, dtype) in NORMS else None
        if ctx.compiled is not None:
            x = x.contiguous()
            out, scale = ctx.compiled.norm(x, weight_D, eps, dtype)
            ctx.save_for_backward(x, weight_D, scale)
            return out
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        return (wide * scale).mul_(weight_D).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_D, scale = ctx.saved_tensors
        width = x.shape[-1]
        if ctx.compiled is not None:
            grad_x, grad_weight = ctx.compiled.norm_back(grads[0].contiguous(), x, weight_D, scale)
            return grad_x, grad_weight.to(weight_D.dtype), None, None
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
        compiled = _compiled(g_MF.shape[1], g_MF, u_MF)
        if compiled is not None:
            activated_MF = compiled.gated_(g_MF, u_MF, g_MF if recompute else torch.empty_like(g_MF))
        else:
            activated_MF = F.silu(g_MF, inplace=recompute).mul_(u_MF)
        return product(activated_MF, low[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_MD, *saved = ctx.saved_tensors  # read once: activation checkpointing allows no second time
        gate, up, down = (weight.to(x_MD.dtype) for weight in saved[:3])
        g_MF, u_MF = saved[3:] or (product(x_MD, gate), product(x_MD, up))
        need_x, *need = ctx.needs_input_grad[:4]
        grad_MD = grads[0].contiguous()
        compiled = _compiled(g_MF.shape[1], g_MF, u_MF, grad_MD)
        if compiled is not None:
            inner, grad_g, grad_u = compiled.gated_back_(g_MF, u_MF, product(grad_MD, down.T))
            grad_down = weight_gradient(grad_MD, inner, saved[2]) if need[2] else None
        else:
            # Two tensors of this size are made and written over: fresh memory costs more than the arithmetic.
            activated = F.silu(g_MF)
            inner = activated * u_MF
            grad_down = weight_gradient(grad_MD, inner, saved[2]) if need[2] else None
            grad_h = product(grad_MD, down.T, inner)
            grad_u = activated.mul_(grad_h)
            grad_g = torch.ops.aten.silu_backward.grad_input(grad_h.mul_(u_MF), g_MF, grad_input=grad_h)
        del inner
        grad_gate = weight_gradient(grad_g, x_MD, saved[0]) if need[0] else None
        grad_up = weight_gradient(grad_u, x_MD, saved[1]) if need[1] else None
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


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        compiled = _compiled(gate.shape[-1], gate, up) if gate.dtype == up.dtype else None
        if compiled is None:
            return F.silu(gate) * up
        return compiled.gated_(gate, up, torch.empty_like(gate))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        compiled = _compiled(gate.shape[-1], gate, up, grads[0]) if gate.dtype == up.dtype else None
        if compiled is not None:
            return compiled.gated_back_(gate, up, grads[0].clone(memory_format=torch.contiguous_format))[1:]
        grad_gate = torch.ops.aten.silu_backward((grads[0] * up).to(gate.dtype), gate)
        return grad_gate, (F.silu(gate) * grads[0]).to(up.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, where the products before and after it are others' (LoRA's); bit for bit as in `gated_mlp`."""
    return _Gated.apply(gate, up)  # type: ignore[return-value]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        compiled = _compiled(x.shape[-1] // 2, x, cos, sin)
        if compiled is not None and _rows(x, cos, sin):
            return compiled.turn(x, cos[0, 0].contiguous(), sin[0, 0].contiguous())
        (cos_1, cos_2), (sin_1, sin_2) = cos.chunk(2, -1), sin.chunk(2, -1)
        return _turn(x, (cos_1, -sin_1), (cos_2, sin_2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        compiled = _compiled(cos.shape[-1] // 2, grads[0], cos, sin)
        if compiled is not None and _rows(grads[0], cos, sin):
            return compiled.turn(grads[0], cos[0, 0].contiguous(), sin[0, 0].contiguous(), back=True), None, None
        (cos_1, cos_2), (sin_1, sin_2) = cos.chunk(2, -1), sin.chunk(2, -1)
        return _turn(grads[0], (cos_1, sin_2), (cos_2, -sin_1)), None, None


def _rows(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether heads are contiguous, and have a factor for each number; tokens and heads may lie in any order."""
    whole = cos.shape == sin.shape == (1, 1, *x.shape[2:])
    return whole and x.shape[0] == 1 and x.stride(-1) == 1


def _turn(x: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """[x1 · a + x2 · b, x2 · c + x1 · d] of the halves x1, x2 of the last axis, in the factors' dtype inside."""
    result = torch.empty_like(x)
    one, two = x.to(first[0].dtype).chunk(2, -1)
    for room, own, other, (along, across) in zip(
        result.chunk(2, -1), (one, two), (two, one), (first, second), strict=True
    ):
        if room.dtype == own.dtype:
            torch.mul(own, along, out=room).addcmul_(other, across)
        else:
            room.copy_((own * along).addcmul_(other, across))
    return result


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding with the two halves of a head as coordinates (Su et al. 2021, as Llama has it).

    Args:
        x: [1, heads, T, D].
        cos: [1, T, D].
        sin: likewise.

    Returns:
        Like x, in its dtype and memory order.
    """
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    return _Rotary.apply(x, cos[:, None].to(dtype), sin[:, None].to(dtype))  # type: ignore[return-value]
