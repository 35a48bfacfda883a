"""Attention over tiles by plain matrix products: the fastest way on a CPU, forward and backward.

PyTorch's CPU kernel reaches a third of the matrix products' speed in fp32 and a tenth in bf16. Here the query heads that
share a key head lie side by side, so a tile is three products forward and five backward over tall matrices, with
nothing repeated; scores and softmax are fp32 whatever the dtype, and are computed again in backward instead of kept.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tulu_lightning.core.matmul import fp32_library
from tulu_lightning.models.tiles import Tile, tiles
from tulu_lightning.types import Span

__all__ = ["MatmulTiles"]

SIZE = 96
"""Tokens of one tile; measured flat from 64 to 128 on SmolLM2 (more calls below, more masked work above)."""


class _Cut(NamedTuple):
    tiles: tuple[Tile, ...]
    biases: tuple[Tensor, ...]
    """fp32 [queries, 1, queries] of each tile: 0 where its own tokens see each other, -inf elsewhere."""


class MatmulTiles:
    """A pack cut for matrix products."""

    def __init__(self, spans: Sequence[Span], device: torch.device | None = None) -> None:
        """Cut a pack; done once per forward and shared by all layers."""
        cut = tiles(spans, SIZE, SIZE)
        causal = _bias(torch.ones(SIZE, SIZE, dtype=torch.bool).tril()).to(device)
        biases = []
        for tile in cut:
            count = tile.end - tile.start
            biases.append(causal[:count, :, :count] if tile.mask is None else _bias(tile.mask).to(device))
        self.cut = _Cut(cut, tuple(biases))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one layer; arguments and result as `SdpaTiles`, all in the values' dtype."""
        dtype = value.dtype
        with torch.autocast(query.device.type, enabled=False):  # it would round the scores to bf16
            return _Attention.apply(query, key, value, self.cut, scale, dtype)


def _bias(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)[:, None]


class _Attention(torch.autograd.Function):
    """Softmax attention. Axes inside: [key heads, tokens x group, width], the query heads of a group side by side."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cut: _Cut, scale: float, dtype: torch.dtype
    ) -> Tensor:
        heads, group = key.shape[1], query.shape[1] // key.shape[1]
        folded = [_fold(x, heads, dtype) for x in (query, key, value)]
        q, k, v = (x.to(_products(dtype)) for x in folded)
        out = folded[0].new_empty(heads, q.shape[1], v.shape[2])
        for tile, bias in zip(*cut, strict=True):
            rows = slice(tile.start * group, tile.end * group)
            p = _probabilities(q[:, rows], _ranges(k, tile.keys), bias, scale)
            out[:, rows] = torch.bmm(p.to(v.dtype), _ranges(v, tile.keys))
        ctx.save_for_backward(*folded)
        ctx.cut, ctx.scale = cut, scale
        ctx.inputs = [torch.empty_like(x, device="meta") for x in (query, key, value)]
        # [heads, T x group, width] -> [1, T, heads x group, width]
        return out.view(heads, -1, group, v.shape[2]).transpose(0, 1).reshape(1, -1, heads * group, v.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v = (x.to(_products(x.dtype)) for x in ctx.saved_tensors)
        heads, tokens = k.shape[:2]
        group, work = q.shape[1] // tokens, _work(q.dtype)
        with torch.autocast(q.device.type, enabled=False):
            dout = _fold(grads[0].transpose(1, 2), heads, q.dtype)
            dq = torch.empty_like(q)
            dk, dv = (torch.zeros_like(x, dtype=work) for x in (k, v))
            for tile, bias in zip(*ctx.cut, strict=True):
                rows = slice(tile.start * group, tile.end * group)
                keys, d = _ranges(k, tile.keys), dout[:, rows]
                p = _probabilities(q[:, rows], keys, bias, ctx.scale)
                _add(dv, tile.keys, torch.bmm(p.to(q.dtype).transpose(1, 2), d))
                dp = torch.bmm(d.to(work), _ranges(v, tile.keys).to(work).transpose(1, 2))
                ds = torch.ops.aten._softmax_backward_data(dp, p, -1, work).to(q.dtype)
                dq[:, rows] = torch.bmm(ds, keys)
                _add(dk, tile.keys, torch.bmm(ds.transpose(1, 2), q[:, rows]))
        dq, dk = dq.mul_(ctx.scale), dk.mul_(ctx.scale)
        return (*(_unfold(x, like, heads) for x, like in zip((dq, dk, dv), ctx.inputs, strict=True)), None, None, None)


def _products(dtype: torch.dtype) -> torch.dtype:
    """What products of values and of gradients run in: where fp32 products are fast, tiles of bf16 ones are no faster."""
    return torch.float32 if dtype == torch.bfloat16 and fp32_library() == "default" else dtype


def _work(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _fold(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[1, heads x group, T, width] -> [heads, T x group, width], a copy."""
    _, count, tokens, width = x.shape
    folded = torch.empty(heads, tokens, count // heads, width, dtype=dtype, device=x.device)
    folded.copy_(x[0].unflatten(0, (heads, count // heads)).transpose(1, 2))
    return folded.view(heads, -1, width)


def _unfold(x: Tensor, like: Tensor, heads: int) -> Tensor:
    """The inverse of `_fold`, in the memory order and dtype of the input whose gradient it is."""
    _, count, tokens, width = like.shape
    result = torch.empty_like(like, device=x.device)
    folded = x.view(heads, tokens, count // heads, width)
    result[0].unflatten(0, (heads, count // heads)).copy_(folded.transpose(1, 2))
    return result


def _ranges(x: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Some ranges of tokens; a view where they touch."""
    whole = ranges[-1][1] - ranges[0][0]
    if whole == sum(end - start for start, end in ranges):
        return x[:, ranges[0][0] : ranges[-1][1]]
    return torch.cat([x[:, start:end] for start, end in ranges], 1)


def _add(total: Tensor, ranges: Sequence[tuple[int, int]], part: Tensor) -> None:
    at = 0
    for start, end in ranges:
        total[:, start:end] += part[:, at : at + end - start]
        at += end - start


def _probabilities(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Softmax of the scores; the bias covers the last keys, those of the tile itself."""
    work, count = _work(q.dtype), bias.shape[0]
    scores = torch.bmm(q.to(work) * scale, k.to(work).transpose(1, 2))
    scores.unflatten(1, (count, -1))[..., -count:].add_(bias)
    return scores.softmax(-1)
