"""Attention over segments by `assets/kernels/segments.cpp`: the fastest way on a CPU, forward and backward.

Scores are computed for keys that somebody sees, and little more: a document's tokens go by 48 at a time, where tiles
of matrix products take squares of 96 and join documents. Everything is fp32 inside, whatever the dtype.
"""

import ctypes
import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tulu_lightning.assets.compiled import KERNELS, load_compiled
from tulu_lightning.models.compiled import DTYPES, LANES, bind, fp32_room, takes
from tulu_lightning.models.matmul import MatmulTiles
from tulu_lightning.types import Span

__all__ = ["CompiledSegments", "SegmentKernels", "segment_kernels"]

PANEL = 64
"""Columns of the widest panel of keys."""


class _Pack(ctypes.Structure):
    """`Pack` of segments.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("documents", "heads", "group")),
        *((name, ctypes.c_void_p) for name in ("segment", "document")),
        *((name, ctypes.c_int64) for name in ("columns", "tokens")),
        *((f"{name}_{axis}", ctypes.c_int64) for name in ("q", "k", "v", "grad") for axis in ("token", "head")),
        ("scale", ctypes.c_float),
    )


class SegmentKernels:
    """The functions of one library, for one width of heads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, whole = ctypes.c_void_p, ctypes.c_int64
        self._room = library.room
        self._room.argtypes, self._room.restype = [pointer], whole
        self._forward = {
            dtype: bind(library, f"attention_{name}", *[pointer] * 6, whole, pointer) for dtype, name in DTYPES.items()
        }
        self._backward = {
            dtype: bind(library, f"attention_back_{name}", *[pointer] * 10, whole, pointer)
            for dtype, name in DTYPES.items()
        }

    def forward(self, cut: "_Cut", q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """[1, T, heads, width], and fp32 [heads, T], the logarithm of each query's sum."""
        _, heads, tokens, width = q.shape
        pack = cut.pack(q, k, v, None, scale)
        out, lse = q.new_empty(1, tokens, heads, width), fp32_room(heads, tokens)
        self._forward[q.dtype](ctypes.addressof(pack), q, k, v, out, lse, tokens, self._space(pack))
        return out, lse

    def backward(
        self, cut: "_Cut", q: Tensor, k: Tensor, v: Tensor, lse: Tensor, grad: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        """Gradients of queries, keys and values, shaped like these and with a token's heads side by side."""
        _, heads, tokens, width = q.shape
        pack = cut.pack(q, k, v, grad, scale)
        made = [x.new_empty(1, tokens, x.shape[1], width) for x in (q, k, v)]
        parts = fp32_room(2, heads, tokens, width)
        at = (ctypes.addressof(pack), q, k, v, grad, lse, *made, parts)
        self._backward[q.dtype](*at, tokens, self._space(pack))
        return tuple(x.transpose(1, 2) for x in made)

    def _space(self, pack: _Pack) -> Tensor:
        return fp32_room(torch.get_num_threads() * self._room(ctypes.addressof(pack)))


@functools.cache
def segment_kernels(width: int) -> SegmentKernels:
    """The functions for heads of this width.

    Raises:
        RuntimeError: there are none; it says why.
    """
    if width % LANES:
        raise RuntimeError(f"heads are {width} wide, which is no multiple of {LANES}")
    made = load_compiled(KERNELS / "segments.cpp", (("WIDTH", width),))
    if made.library is None:
        raise RuntimeError(made.said)
    return SegmentKernels(made.library)


class _Cut:
    """The segments of a pack, document by document, the costliest first."""

    def __init__(self, spans: Sequence[Span]) -> None:
        rows, documents = [], []
        self.columns = self.tokens = 0
        for start, stop in pairwise([*_first(spans), len(spans)]):
            column, cost = 0, 0
            seen: dict[int, int] = {}
            for index in range(start, stop):
                begin, end, parent = spans[index]
                rows += [begin, end, parent, column]
                column += -(-(end - begin) // PANEL) * PANEL
                before = seen.get(parent, 0)
                seen[index] = before + end - begin
                cost += (end - begin) * (before + seen[index])
            self.columns = max(self.columns, column)
            self.tokens = max(self.tokens, spans[stop - 1].end - spans[start].start)
            documents.append((-cost, start, stop))
        self.segments = torch.tensor(rows, dtype=torch.int64, device="cpu")
        self.documents = torch.tensor([each[1:] for each in sorted(documents)], dtype=torch.int64, device="cpu")

    def pack(self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None, scale: float) -> _Pack:
        """What the functions are told of it, and of where the numbers lie; valid as long as this is."""
        heads, key_heads = q.shape[1], k.shape[1]
        strides = [(x.stride(2), x.stride(1)) for x in (q, k, v, q if grad is None else grad)]
        return _Pack(
            *(len(self.documents), heads, heads // key_heads),
            *(self.segments.data_ptr(), self.documents.data_ptr(), self.columns, self.tokens),
            *(each for pair in strides for each in pair),
            scale,
        )


def _first(spans: Sequence[Span]) -> list[int]:
    """The first segment of each document."""
    first: list[int] = []
    for index, span in enumerate(spans):
        if span.parent < 0:
            first.append(index)
        else:
            while span.parent < first[-1]:
                first.pop()  # a parent further back: what lies between is its document, too
    return first


class CompiledSegments:
    """A pack for the compiled functions; dtypes and widths that they do not know go to matrix products."""

    def __init__(self, spans: Sequence[Span], device: torch.device | None = None) -> None:
        """Cut a pack; done once per forward and shared by all layers."""
        self.spans, self.device, self.cut = spans, device, _Cut(spans)
        self.plain: MatmulTiles | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one layer; arguments and result as `SdpaTiles`, all in the values' dtype."""
        dtype = value.dtype
        widths = {x.shape[-1] for x in (query, key, value)}  # two where heads are latent ones (DeepSeek's)
        if not takes(value) or len(widths) > 1 or widths.pop() % LANES:
            self.plain = self.plain or MatmulTiles(self.spans, self.device)
            return self.plain(query, key, value, scale)
        made: Any = _Attention.apply(query.to(dtype), key.to(dtype), value, self.cut, scale)
        return made


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, cut: _Cut, scale: float) -> Tensor:
        query, key, value = (_in_rows(x) for x in (query, key, value))
        ctx.kernels = segment_kernels(query.shape[-1])
        out, lse = ctx.kernels.forward(cut, query, key, value, scale)
        ctx.save_for_backward(query, key, value, lse)
        ctx.cut, ctx.scale = cut, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, lse = ctx.saved_tensors
        grad = _in_rows(grads[0].to(query.dtype).transpose(1, 2))
        return (*ctx.kernels.backward(ctx.cut, query, key, value, lse, grad, ctx.scale), None, None)


def _in_rows(x: Tensor) -> Tensor:
    """With heads that are contiguous; others are copied."""
    return x if x.stride(-1) == 1 else x.contiguous()
