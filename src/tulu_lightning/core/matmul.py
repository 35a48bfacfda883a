"""fp32 matrix products on the CPU, by the library that is fast there.

PyTorch's x86 builds send fp32 products to MKL. On AMD processors MKL takes a slow path: less than half of what
oneDNN, which is in the same build, does with the same numbers (`docs/performance.md`). So there, and only there, fp32 linear layers
and the head go through oneDNN. Both compute in true fp32; sums are added in another order, so results differ in the
last bits. The choice depends on the processor alone, never on a timing: a run that goes on takes the same one.

bf16 products and everything off the CPU are PyTorch's own.
"""

import functools
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tulu_lightning.core.gradients import PLAIN, room_of

__all__ = ["fp32_library", "linear", "low_linear", "product", "weight_gradient"]


@functools.cache
def fp32_library() -> str:
    """The library that multiplies fp32 matrices on this machine's CPU: "onednn", or "default" for PyTorch's choice."""
    return "onednn" if _vendor() == "AuthenticAMD" and _onednn_works() else "default"


def _vendor() -> str:
    if platform.machine() not in ("x86_64", "AMD64"):
        return ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "AuthenticAMD" if "AuthenticAMD" in platform.processor() else ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def _onednn_works() -> bool:
    """The operator is PyTorch's own but not public: it is used only where it gives what a product gives."""
    try:
        a, b = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
        return torch.backends.mkldnn.is_available() and torch.equal(_onednn(a, b), a @ b.T)
    except (AttributeError, RuntimeError, TypeError):
        return False


def _onednn(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")


def _takes(*tensors: Tensor) -> bool:
    return (
        all(t.dtype == torch.float32 and t.device.type == "cpu" and type(t) in PLAIN and t.numel() for t in tensors)
        and fp32_library() == "onednn"
    )


def product(a_MK: Tensor, b_NK: Tensor, out_MN: Tensor | None = None) -> Tensor:
    """a @ b.T without a gradient; either may be a transposed view.

    Args:
        a_MK: [M, K].
        b_NK: [N, K], like a linear layer's weight.
        out_MN: room for the result, used where the library takes one; read what is returned.

    Returns:
        [M, N], in the common dtype.
    """
    if _takes(a_MK, b_NK):
        with torch.no_grad():
            return _onednn(a_MK, b_NK)
    with torch.no_grad():
        return torch.mm(a_MK, b_NK.T, out=out_MN)


def weight_gradient(grad_MN: Tensor, x_MK: Tensor, weight_NK: Tensor) -> Tensor | None:
    """grad.T @ x, in the weight's dtype; None where it has been added to the weight's `.grad` (`core.gradients`)."""
    sum_NK = room_of(weight_NK)
    if sum_NK is None:
        return product(grad_MN.T, x_MK.T).to(weight_NK.dtype)
    with torch.no_grad():
        if grad_MN.dtype == sum_NK.dtype and not _takes(grad_MN, x_MK):
            sum_NK.addmm_(grad_MN.T, x_MK)
        else:
            sum_NK += product(grad_MN.T, x_MK.T)
    return None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, used_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_MK, weight_NK)  # not its copy, which is made again: that costs less than keeping it
        return product(x_MK, used_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_MK, weight_NK = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        grad_MN = grads[0].contiguous()  # an expanded gradient has strides that oneDNN does not read
        grad_x = product(grad_MN, weight_NK.to(x_MK.dtype).T) if need_x else None
        grad_weight = weight_gradient(grad_MN, x_MK, weight_NK) if need_weight else None
        return grad_x, grad_weight, None


def low_linear(x: Tensor, weight_NK: Tensor, low_NK: Tensor) -> Tensor:
    """x @ weight.T computed with a copy of the weight in x's dtype; the gradient goes to the weight itself.

    Args:
        x: [..., K].
        weight_NK: the parameter.
        low_NK: its copy, in the dtype of `x`.

    Returns:
        [..., N]; differentiable once.
    """
    out = _Linear.apply(x.reshape(-1, x.shape[-1]), weight_NK, low_NK)
    return out.view(*x.shape[:-1], -1)  # type: ignore[union-attr]


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, by the fast library where there is one.

    Args:
        x: [..., K].
        weight_NK: [N, K].
        bias_N: [N], or None.

    Returns:
        [..., N]; differentiable once.
    """
    if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling() or not _takes(x, weight_NK):
        return F.linear(x, weight_NK, bias_N)
    out = low_linear(x, weight_NK, weight_NK.detach())
    return out if bias_N is None else out + bias_N
