"""A pack cut into tiles, and attention over them by PyTorch's own kernel: right on every device.

A *tile* is a run of query tokens with the key ranges before it that all of them see, and its own square, in which a
mask says who sees whom. Neighbouring short segments share a tile; no mask is ever larger than a tile's own square, so
a pack of T tokens costs no T x T anything.

Queries, keys and values are split once at all edges, never sliced tile by tile: the gradient of a slice is a tensor of
zeros as long as the pack, and there would be three of those per tile and layer.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tulu_lightning.core.packing import ancestors
from tulu_lightning.core.visibility import sees, visibility
from tulu_lightning.types import Span

__all__ = ["SdpaTiles", "Tile", "tiles"]

TILE = 256
"""Tokens up to which the segments of a document share one dense mask: fewer, larger kernel calls."""
BLOCK = 512
"""Queries of one tile at most when a long child attends to its parent: bounds the mask."""


class Tile(NamedTuple):
    """Query tokens [start, end) and what they see."""

    start: int
    end: int
    before: tuple[tuple[int, int], ...]
    """Key ranges, in order, that every query of the tile sees whole."""
    mask: Tensor | None
    """bool [queries, queries], which of the tile's own tokens see each other; None means causal."""

    @property
    def keys(self) -> tuple[tuple[int, int], ...]:
        """All key ranges: those before, and the tile's own."""
        return (*self.before, (self.start, self.end))


def tiles(spans: Sequence[Span], size: int, block: int | None = None, join: bool = True) -> tuple[Tile, ...]:
    """Cut a pack into tiles, in token order.

    Args:
        spans: the pack's segments.
        size: tokens up to which neighbouring segments share a tile.
        block: most queries of a tile; longer segments are cut. None leaves first segments whole, which a causal kernel
            likes best, and cuts children at `BLOCK`.
        join: whether whole documents share a tile, too.
    """
    cutter = _Cutter(spans, size, block, join)
    for index in range(len(spans)):
        cutter.add(index)
    cutter.close()
    return tuple(cutter.result)


class _Cutter:
    """Gathers neighbouring segments that see the same tokens before the tile, as long as they fit."""

    def __init__(self, spans: Sequence[Span], size: int, block: int | None, join: bool) -> None:
        self.spans, self.size, self.block, self.join = spans, size, block, join
        self.seen = visibility(spans)
        self.result: list[Tile] = []
        self.group: list[int] = []

    def add(self, index: int) -> None:
        span = self.spans[index]
        if self.group and not self._fits(index):
            self.close()
        if span.end - span.start <= self.size:
            self.group.append(index)
        else:
            self.result += self._blocks(index)

    def _fits(self, index: int) -> bool:
        """A segment joins if all it sees is in the tile, or is what the tile's first segment sees before it."""
        first, span = self.spans[self.group[0]], self.spans[index]
        if span.end - first.start > self.size or (span.parent < 0 and not self.join):
            return False
        outside = [parent for parent in ancestors(self.spans, index) if parent < self.group[0]]
        return tuple(outside) == ancestors(self.spans, self.group[0])

    def close(self) -> None:
        if not self.group:
            return
        start, end = self.spans[self.group[0]].start, self.spans[self.group[-1]].end
        own = torch.arange(start, end)
        mask = sees(self.seen, own[:, None], own[None]) if len(self.group) > 1 else None
        self.result.append(Tile(start, end, self._before(self.group[0]), mask))
        self.group = []

    def _before(self, index: int) -> tuple[tuple[int, int], ...]:
        return tuple(self.spans[parent][:2] for parent in ancestors(self.spans, index))

    def _blocks(self, index: int) -> list[Tile]:
        """Tiles of one long segment: blocks of queries, each with all that comes before it."""
        start, end, parent = self.spans[index]
        block = self.block or (end - start if parent < 0 else BLOCK)
        before = self._before(index)
        edges = range(start, end, -(-(end - start) // -(-(end - start) // block)))  # even blocks of at most `block`
        return [
            Tile(first, min(first + edges.step, end), (*before, (start, first)) if first > start else before, None)
            for first in edges
        ]


class SdpaTiles:
    """One `scaled_dot_product_attention` a tile."""

    def __init__(self, spans: Sequence[Span], device: torch.device | None = None) -> None:
        """Cut a pack; done once per forward and shared by all layers."""
        # Plain documents stay apart: a causal kernel call for each is cheaper than a mask for several.
        self.tiles = tiles(spans, TILE, join=False)
        edges = sorted({edge for tile in self.tiles for range_ in tile.keys for edge in range_})
        self.sizes = [end - start for start, end in pairwise(edges)]
        self.at = {edge: number for number, edge in enumerate(edges)}
        self.masks = [_whole_mask(tile, device) for tile in self.tiles]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one layer.

        Args:
            query: [1, heads, T, width].
            key: [1, key heads, T, width].
            value: like `key`.
            scale: of the scores.

        Returns:
            [1, T, heads, width].
        """
        queries, keys, values = (x.to(value.dtype).split(self.sizes, 2) for x in (query, key, value))
        parts = []
        for tile, mask in zip(self.tiles, self.masks, strict=True):
            q = self._join(queries, ((tile.start, tile.end),))
            k, v = (self._join(pieces, tile.keys) for pieces in (keys, values))
            if q.is_cuda:  # grouped heads with a mask, or in fp32, would fall to a kernel that keeps all scores
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            part = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            parts.append(part.transpose(1, 2))
        return torch.cat(parts, 1)

    def _join(self, pieces: Sequence[Tensor], ranges: Sequence[tuple[int, int]]) -> Tensor:
        chosen = [piece for start, end in ranges for piece in pieces[self.at[start] : self.at[end]]]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, 2)


def _whole_mask(tile: Tile, device: torch.device | None) -> Tensor | None:
    """bool [queries, keys] over all key ranges; None where plain causal attention is the same."""
    if tile.mask is None and not tile.before:
        return None
    count = tile.end - tile.start
    own = torch.ones(count, count, dtype=torch.bool).tril() if tile.mask is None else tile.mask
    before = sum(end - start for start, end in tile.before)
    return torch.cat([torch.ones(count, before, dtype=torch.bool), own], 1).to(device)
