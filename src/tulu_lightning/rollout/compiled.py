"""`assets/kernels/decode.cpp` as functions of tensors: norms, rotary embedding and attention of a decoding step on a CPU.

They are used only where a trial gives what PyTorch's own operators give.
"""

import ctypes
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tulu_lightning.assets.compiled import KERNELS, load_compiled
from tulu_lightning.models.compiled import DTYPES, LANES, fp32_room, largest

__all__ = ["Kernels", "Shared", "available", "kernels"]

SOURCE = KERNELS / "decode.cpp"

_log = logging.getLogger(__name__)


class _Shape(ctypes.Structure):
    """`Shape` of decode.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "heads", "key_heads", "slot_stride", "head_stride")),
        *((name, ctypes.c_int64) for name in ("shared_slot_stride", "shared_head_stride")),
        *((name, ctypes.c_void_p) for name in ("size", "first", "member")),
        ("slots", ctypes.c_int64),
    )


class Shared(NamedTuple):
    """Which rows see which slots of shared keys and values. P: slots."""

    size_P: Tensor
    """int64, filled places of each."""
    first_P: Tensor
    """int64 [P + 1], where the members of each begin in `member_B`; the last one is B."""
    member_B: Tensor
    """int64, the rows, slot by slot."""

    @staticmethod
    def of(group_B: Sequence[int], size_P: Sequence[int]) -> "Shared":
        """From each row's slot and the filled places of each slot."""
        group, size = torch.tensor(group_B, dtype=torch.int64), torch.tensor(size_P, dtype=torch.int64)
        first = torch.zeros(len(size) + 1, dtype=torch.int64)
        first[1:] = torch.bincount(group, minlength=len(size)).cumsum(0)
        return Shared(size, first, torch.argsort(group, stable=True))


class Kernels:
    """The compiled functions for one dtype and one shape of attention. H: query heads, K: key heads, d: their width.

    Args:
        library: of decode.cpp, compiled for this width.
        dtype: of all tensors.
        heads: H.
        key_heads: K.
        width: d.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, heads: int, key_heads: int, width: int) -> None:
        self.heads, self.key_heads, self.width = heads, key_heads, width
        pointer, whole, real, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int

        def bound(name: str, *arguments: Any) -> Callable[..., None]:
            function = getattr(library, f"{name}_{DTYPES[dtype]}")
            function.argtypes, function.restype = [*arguments, threads], None
            return function

        self._norm = bound("norm", *[pointer] * 3, whole, whole, real)
        self._gated = bound("gated", *[pointer] * 2, *[whole] * 2)
        self._turn = bound("turn", *[pointer] * 4, *[whole] * 4, real)
        self._attend = bound("attend", *[pointer] * 9)
        self._draw = bound("draw", *[pointer] * 4, whole, whole, real)

    def norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """RMS norm [T, D], rounded before the weight as by transformers."""
        x_TD, out_TD = x_TD.contiguous(), torch.empty_like(x_TD)
        rows, width = x_TD.shape
        at = (x_TD.data_ptr(), weight_D.data_ptr(), out_TD.data_ptr())
        self._norm(*at, rows, width, eps, torch.get_num_threads())
        return out_TD

    def gated(self, both_TF: Tensor) -> Tensor:
        """silu(gate) x up [T, F], of gates and ups side by side, [T, 2F]."""
        both_TF, rows, width = both_TF.contiguous(), len(both_TF), both_TF.shape[1] // 2
        out = both_TF.new_empty(rows, width)
        self._gated(both_TF.data_ptr(), out.data_ptr(), rows, width, torch.get_num_threads())
        return out

    def turn_(self, qkv: Tensor, cos_Sd: Tensor, sin_Sd: Tensor, positions_T: Tensor, scale: float) -> None:
        """Rotary embedding in place of queries and keys in [T, H + K + K, d]; queries are multiplied by `scale`, too.

        Sines are signed: the table's first half holds the negative ones.
        """
        at = (qkv.data_ptr(), cos_Sd.data_ptr(), sin_Sd.data_ptr(), positions_T.data_ptr())
        self._turn(*at, len(qkv), self.heads, self.key_heads, self.width, scale, torch.get_num_threads())

    def attend(
        self, qkv: Tensor, kv: Tensor, filled_B: Tensor, shared: Shared | None = None, shared_kv: Tensor | None = None
    ) -> Tensor:
        """Put one token's keys and values a row into its slot, and attend to all that the slot holds then.

        Args:
            qkv: [B, H + K + K, d], queries scaled.
            kv: [2, slots, K, places, d], one layer's; written to. Slots 0 to B - 1 are the rows'.
            filled_B: int64 [B], places of each row's slot that are filled already.
            shared: what rows see besides; each sees one slot.
            shared_kv: like `kv`, with the slots that `shared` speaks of.

        Returns:
            [B, H x d].
        """
        count = len(qkv)
        out = qkv.new_empty(count, self.heads * self.width)
        shape = _Shape(count, self.heads, self.key_heads, kv.stride(1), kv.stride(2))
        besides, beside = (None, None), None
        if shared is not None and shared_kv is not None:
            beside = fp32_room(count * self.heads * (self.width + 2))
            besides = shared_kv[0].data_ptr(), shared_kv[1].data_ptr()
            shape.shared_slot_stride, shape.shared_head_stride = shared_kv.stride(1), shared_kv.stride(2)
            shape.size, shape.first, shape.member = (each.data_ptr() for each in shared)
            shape.slots = len(shared.size_P)
        at = (qkv.data_ptr(), kv[0].data_ptr(), kv[1].data_ptr(), *besides, filled_B.data_ptr())
        room = None if beside is None else beside.data_ptr()
        self._attend(*at, ctypes.addressof(shape), room, out.data_ptr(), torch.get_num_threads())
        return out

    def draw(self, logits_RV: Tensor, temperature: float, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
        """As `sampling.pick` without filters: it sums in another order, so a draw within rounding of a border differs."""
        rows, vocabulary = logits_RV.shape
        logits_RV, uniform_R = logits_RV.contiguous(), uniform_R.float().contiguous()
        token_R, logp_R = torch.empty(rows, dtype=torch.int64, device="cpu"), fp32_room(rows)
        at = (logits_RV.data_ptr(), uniform_R.data_ptr(), token_R.data_ptr(), logp_R.data_ptr())
        self._draw(*at, rows, vocabulary, temperature, torch.get_num_threads())
        return token_R, logp_R


def available() -> tuple[bool, str]:
    """Whether decoding on this machine's CPU is compiled (tried for heads of width 64), and by what, or why not."""
    there = kernels("cpu", torch.float32, 9, 3, 64) is not None
    said = load_compiled(SOURCE, (("WIDTH", 64),))
    return there, said.said if there or said.library is None else "its numbers are not those of PyTorch"


@functools.cache
def kernels(device: str, dtype: torch.dtype, heads: int, key_heads: int, width: int) -> Kernels | None:
    """Compiled functions for this shape, or None where there are none or they are not right; the log says why."""
    if device != "cpu" or dtype not in DTYPES or width % LANES or heads % key_heads:
        return None
    library = load_compiled(SOURCE, (("WIDTH", width),)).library
    if library is None:
        return None
    found = Kernels(library, dtype, heads, key_heads, width)
    off = _difference(found, dtype)
    if off < (0.04 if dtype is torch.bfloat16 else 5e-5):
        return found
    _log.warning("compiled decoding is off by %.1g and is not used; decoding goes on in PyTorch's operators", off)
    return None


def _difference(found: Kernels, dtype: torch.dtype) -> float:
    """The largest one from PyTorch in fp32, for three rows of 1, 70 and 131 places."""
    generator = torch.Generator().manual_seed(0)
    heads, key_heads, width = found.heads, found.key_heads, found.width

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    qkv, kv, filled_B = (
        drawn(3, heads + 2 * key_heads, width),
        drawn(2, 3, key_heads, 140, width),
        torch.tensor([0, 69, 130]),
    )
    weight_D, angle = drawn(width) / 2, torch.rand(5, width // 2, generator=generator)
    cos, sin = angle.cos().repeat(1, 2).to(dtype), torch.cat([-angle.sin(), angle.sin()], 1).to(dtype)
    x = qkv[:, 0].float()
    normed = (x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).to(dtype).float() * weight_D.float()
    off = [found.norm(qkv[:, 0], weight_D, 1e-5).float() - normed]
    both = qkv[:, :2].flatten(1) / 4  # products stay small, and so do their roundings
    gate, up = both.float().chunk(2, -1)
    off.append(found.gated(both).float() - gate * gate.sigmoid() * up)
    qk, at = qkv[:, : heads + key_heads].float(), torch.tensor([4, 0, 2])
    turned = qk * cos[at].float()[:, None] + qk.roll(width // 2, -1) * sin[at].float()[:, None]
    turned[:, :heads] *= 0.125
    found.turn_(qkv, cos, sin, at, 0.125)
    off.append(qkv[:, : heads + key_heads].float() - turned)
    group_B, sizes, shared_kv = [1, 0, 1], [5, 70], drawn(2, 2, key_heads, 70, width)
    for shared in (None, Shared.of(group_B, sizes)):
        out = found.attend(qkv, kv, filled_B, shared, shared_kv).float()
        for row, places in enumerate((filled_B + 1).tolist()):
            slot, many = group_B[row], 0 if shared is None else sizes[group_B[row]]
            seen = torch.cat([shared_kv[:, slot, :, :many], kv[:, row, :, :places]], 2).float()
            k, v = seen.repeat_interleave(heads // key_heads, 1)
            scores = (qkv[row, :heads, None].float() * k).sum(-1)
            off.append(out[row] - (scores.softmax(-1)[:, None] @ v).flatten())
    return largest([*off, *_draws(found, drawn(3, 601))])


def _draws(found: Kernels, logits_RV: Tensor) -> Iterator[Tensor]:
    """How far log-probs are off, and how far what was asked for is from what was drawn: from its mass, or its logit."""
    uniform_R = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float32)
    for temperature in (0.0, 0.7):
        token_R, logp_R = found.draw(logits_RV, temperature, uniform_R)
        token_R1, wide_RV = token_R.clamp(0, logits_RV.shape[1] - 1)[:, None], logits_RV.float()
        p_RV = (wide_RV / (temperature or 1.0)).softmax(-1)
        p_R = p_RV.gather(1, token_R1)[:, 0]
        yield logp_R - p_R.log()
        if temperature:
            end_R = p_RV.cumsum(-1).gather(1, token_R1)[:, 0]
            yield torch.maximum(uniform_R - end_R, end_R - p_R - uniform_R).clamp(min=0)
        else:
            yield wide_RV.amax(-1) - wide_RV.gather(1, token_R1)[:, 0]
