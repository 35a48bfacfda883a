"""`assets/kernels/layers.cpp` as functions of tensors: what stands between a layer's matrix products, on a CPU.

They are used only where a trial gives what PyTorch's own operators give, forward and backward.
"""

import ctypes
import functools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tulu_lightning.assets.compiled import KERNELS, load_compiled
from tulu_lightning.core.gradients import PLAIN
from tulu_lightning.core.logprobs import RowSlopes

__all__ = [
    "DTYPES",
    "LANES",
    "NORMS",
    "LayerKernels",
    "available",
    "bind",
    "fp32_room",
    "head_kernels",
    "largest",
    "layer_kernels",
    "takes",
]

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
LANES = 16
"""Numbers in the widest registers there are: a row's length must be a multiple of it."""
TOGETHER = 32
"""Of layers.cpp: rows whose part of a weight's gradient is added up together."""
NORMS = {(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)}
"""Dtypes of what goes in and what comes out."""

SOURCE = KERNELS / "layers.cpp"

_log = logging.getLogger(__name__)


def bind(library: ctypes.CDLL, name: str, *arguments: Any) -> Callable[..., None]:
    """A function of a library that takes tensors, numbers, or None, and then the number of threads."""
    function = getattr(library, name)
    function.argtypes, function.restype = [*arguments, ctypes.c_int], None

    def call(*given: Any) -> None:
        function(*(x.data_ptr() if isinstance(x, Tensor) else x for x in given), torch.get_num_threads())

    return call


def takes(*tensors: Tensor) -> bool:
    """Whether these can be handed over: plain ones on the CPU, in fp32 or bf16, with something in them."""
    return all(type(x) in PLAIN and x.device.type == "cpu" and x.dtype in DTYPES and x.numel() for x in tensors)


def fp32_room(*shape: int) -> Tensor:
    """Memory for a function to write to, whatever PyTorch's default dtype and device are at the moment.

    transformers sets the default dtype of the whole process while it loads a model, and Lightning in half precision.
    """
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


class LayerKernels:
    """The functions of one library. F: any width, a multiple of 16; results are new unless told."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, whole, real, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int

        def each(name: str, *arguments: Any) -> dict[torch.dtype, Callable[..., None]]:
            return {dtype: bind(library, f"{name}_{suffix}", *arguments) for dtype, suffix in DTYPES.items()}

        def pairs(name: str, *arguments: Any) -> dict[tuple[torch.dtype, torch.dtype], Callable[..., None]]:
            return {(x, y): bind(library, f"{name}_{DTYPES[x]}_{DTYPES[y]}", *arguments) for x, y in NORMS}

        self._norm = pairs("norm", *[pointer] * 4, whole, whole, real)
        self._norm_back = pairs("norm_back", *[pointer] * 6, whole, whole)
        self._gated = each("gated", *[pointer] * 3, whole)
        self._gated_back = each("gated_back", *[pointer] * 5, whole)
        self._turn = each("turn", *[pointer] * 4, *[whole] * 7, flag)
        self._softmax_less = each("softmax_less", *[pointer] * 3, whole, whole, flag)
        self._fold = each("fold", *[pointer] * 4, whole, whole, real)
        self._slope = each("slope", *[pointer] * 6, whole, whole, real)

    def norm(self, x: Tensor, weight_F: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """RMS norm of the last axis, contiguous, in a dtype; and fp32, the factor of each row."""
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        out, inverse = torch.empty_like(x, dtype=dtype), fp32_room(rows)
        self._norm[x.dtype, dtype](x, weight_F.float(), out, inverse, rows, width, eps)
        return out, inverse

    def norm_back(self, grad: Tensor, x: Tensor, weight_F: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of a norm's input and, in fp32, of its weight."""
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        grad_x, parts = torch.empty_like(x), fp32_room(-(-rows // TOGETHER), width)
        self._norm_back[x.dtype, grad.dtype](grad, x, weight_F.float(), inverse, grad_x, parts, rows, width)
        return grad_x, parts.sum(0)

    def gated_(self, gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
        """silu(gate) x up into `out`, which may be one of them."""
        self._gated[gate.dtype](gate, up, out, gate.numel())
        return out

    def gated_back_(self, gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """silu(gate) x up again; the gradient of the gate, which takes the place of `grad`; and that of up."""
        inner, grad_up = torch.empty_like(gate), torch.empty_like(gate)
        self._gated_back[gate.dtype](gate, up, grad, inner, grad_up, gate.numel())
        return inner, grad, grad_up

    def turn(self, x: Tensor, cos_Td: Tensor, sin_Td: Tensor, back: bool = False) -> Tensor:
        """Rotary embedding of [1, heads, T, d] by fp32 [T, d], or its transpose; in the memory order of x."""
        _, heads, tokens, width = x.shape
        out = torch.empty_like(x)
        strides = (x.stride(2), x.stride(1), out.stride(2), out.stride(1))
        self._turn[x.dtype](x, cos_Td, sin_Td, out, tokens, heads, width, *strides, back)
        return out

    def softmax_less_(self, logits_NV: Tensor, target_N: Tensor, gradient: bool = True) -> Tensor:
        """log p(target), fp32 [N]; with `gradient` the logits become softmax less one at the target.

        Raises:
            IndexError: a target that is no word, as of PyTorch's `gather`: there is memory of others.
        """
        least, most = (int(x) for x in torch.aminmax(target_N))
        if least < 0 or most >= logits_NV.shape[1]:
            wrong = least if least < 0 else most
            raise IndexError(f"target {wrong} is none of a vocabulary of {logits_NV.shape[1]}")
        logp_N = fp32_room(len(target_N))
        self._softmax_less[logits_NV.dtype](logits_NV, target_N, logp_N, *logits_NV.shape, gradient)
        return logp_N

    def fold_(self, logits_NK: Tensor, by: float, maximum_N: Tensor, sum_N: Tensor, moment_N: Tensor | None) -> None:
        """As `core.logprobs.TileMath`."""
        self._fold[logits_NK.dtype](logits_NK, maximum_N, sum_N, moment_N, *logits_NK.shape, by)

    def slope_(self, logits_NK: Tensor, by: float, place_N: Tensor, rows: RowSlopes) -> None:
        """As `core.logprobs.TileMath`."""
        self._slope[logits_NK.dtype](logits_NK, place_N, *rows, *logits_NK.shape, by)


def head_kernels(hidden_ND: Tensor, head_VD: Tensor) -> LayerKernels | None:
    """Those for a head's logits, where the vocabulary is a multiple of 16."""
    return layer_kernels() if len(head_VD) % LANES == 0 and takes(hidden_ND) else None


def available() -> tuple[bool, str]:
    """Whether layers are compiled on this machine's CPU, and by what, or why not."""
    there = layer_kernels() is not None
    said = load_compiled(SOURCE)
    return there, said.said if there or said.library is None else "its numbers are not those of PyTorch"


@functools.cache
def layer_kernels() -> LayerKernels | None:
    """The compiled functions, or None where there are none or they are not right; the log says why."""
    library = load_compiled(SOURCE).library
    if library is None:
        return None
    found = LayerKernels(library)
    with torch.inference_mode(False), torch.enable_grad():
        offs = [_difference(found, dtype) / (5e-5 if dtype == torch.float32 else 0.04) for dtype in DTYPES]
    off = max(offs)
    if off < 1:
        return found
    _log.warning("compiled layers are off by %.1f times what rounding gives; PyTorch's operators are used", off)
    return None


def _difference(found: LayerKernels, dtype: torch.dtype) -> float:
    """The largest one from PyTorch in fp32, among numbers of about 1."""
    own: Any = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float32, "device": "cpu"}
    x, up, grad = (torch.randn(50, 96, **own).to(dtype) for _ in range(3))
    cos, sin = (torch.rand(50, 96, **own) for _ in range(2))
    weight, target = torch.rand(96, **own), torch.arange(50)
    wide, wide_up, weight_leaf = (each.float().requires_grad_() for each in (x, up, weight))

    out, inverse = found.norm(x, weight, 1e-5, dtype)
    grad_x, grad_weight = found.norm_back(grad, x, weight, inverse)
    plain = F.rms_norm(wide, (96,), weight_leaf, 1e-5)
    pairs = [(out, plain), *_grads((grad_x, grad_weight), plain, (wide, weight_leaf), grad)]

    inner, grad_gate, grad_up = found.gated_back_(x, up, grad.clone())
    plain = F.silu(wide) * wide_up
    pairs += [(found.gated_(x, up, torch.empty_like(x)), plain), (inner, plain)]
    pairs += _grads((grad_gate, grad_up), plain, (wide, wide_up), grad)

    heads, heads_grad = x[None, None], grad[None, None]
    plain = wide * cos + torch.cat([-wide[:, 48:], wide[:, :48]], 1) * sin
    pairs.append((found.turn(heads, cos, sin)[0, 0], plain))
    pairs += _grads((found.turn(heads_grad, cos, sin, back=True)[0, 0],), plain, (wide,), grad)

    logp = wide.log_softmax(-1)
    plain, entropy = logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    logits = x.clone()
    pairs.append((found.softmax_less_(logits, target), plain))
    pairs += _grads((-logits,), plain, (wide,), torch.ones(50))

    maximum, total, moment = fp32_room(50).fill_(-1e30), fp32_room(50).zero_(), fp32_room(50).zero_()
    for part in (x[:, :64], x[:, 64:]):
        found.fold_(part.contiguous(), 1.0, maximum, total, moment)
    lse = maximum + total.log()
    pairs += [(lse, wide.logsumexp(-1)), (total.log() - moment / total, entropy)]
    logits, level, more = x.clone(), entropy.detach().contiguous(), fp32_room(50).fill_(0.5)
    found.slope_(logits, 1.0, target, RowSlopes(lse.detach(), fp32_room(50).fill_(1), level, more))
    pairs += _grads((logits,), plain + 0.5 * entropy, (wide,), torch.ones(50))
    return largest((one.float() - other).detach() for one, other in pairs)


def largest(differences: Iterable[Tensor]) -> float:
    """The largest number of all, with no regard to signs; infinite if one of them is not a number."""
    worst = float(torch.stack([each.abs().max().float() for each in differences]).max())  # Python's max passes over NaN
    return worst if worst == worst else math.inf


def _grads(
    made: Sequence[Tensor], plain: Tensor, inputs: Sequence[Tensor], grad: Tensor
) -> list[tuple[Tensor, Tensor]]:
    found = torch.autograd.grad(plain, inputs, grad.float(), retain_graph=True)
    sizes = [max(1.0, float(each.abs().max()) / 4) for each in found]  # the weight's is a sum of 50
    return [(one / size, other / size) for one, other, size in zip(made, found, sizes, strict=True)]
