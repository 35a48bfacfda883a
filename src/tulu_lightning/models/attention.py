"""Attention over packed segments, registered with transformers as `tulu_segments`.

A segment's token sees the tokens of its chain of parents and its own earlier tokens, and nothing else. The pack is cut
into *tiles*: a run of query tokens with the few key ranges that they may see. Documents that fit together into
`TILE` tokens share one small dense mask; a long document's first segment is plain causal attention; children of a long
parent attend to the parent's keys concatenated before their own. No mask is ever larger than a tile's queries times
its keys, so a pack of T tokens costs no T x T anything.

Exactness (packed equals alone, forward and backward) is tested against transformers' own attention.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from tulu_lightning.core.packing import ancestors
from tulu_lightning.errors import InputError
from tulu_lightning.types import Span

__all__ = ["NAME", "Tile", "tiles"]

NAME = "tulu_segments"
TILE = 256
"""Tokens up to which neighbours share one dense mask: fewer, larger kernel calls for a little masked work."""
BLOCK = 512
"""Queries of one tile at most when a long child attends to its parent: bounds the mask."""
EXTRAS = ("softcap", "s_aux", "position_bias", "attention_bias", "head_mask")
"""What some architectures hand to their attention beside queries, keys and values."""


class Tile(NamedTuple):
    """Query tokens [start, end), the key ranges they see in order, and which pairs are allowed."""

    start: int
    end: int
    keys: tuple[tuple[int, int], ...]
    mask: Tensor | None
    """bool [queries, keys]; None means causal over one's own range."""
    reach: int
    """Most keys that one of the queries sees: the longest chain of segments that ends here, in tokens."""


def tiles(spans: Sequence[Span], device: torch.device | None = None) -> tuple[Tile, ...]:
    """Cut a pack into attention tiles, in token order. Computed once per forward and shared by all layers."""
    result: list[Tile] = []
    group: list[int] = []
    for document in _documents(spans):
        size = spans[document[-1]].end - spans[document[0]].start
        held = spans[group[-1]].end - spans[group[0]].start if group else 0
        if group and held + size > TILE:
            result.append(_dense(spans, group, (), device))
            group = []
        if size <= TILE:
            group += document
        else:
            result += _long(spans, document, device)
    if group:
        result.append(_dense(spans, group, (), device))
    return tuple(result)


def _documents(spans: Sequence[Span]) -> list[list[int]]:
    documents: list[list[int]] = []
    for index, span in enumerate(spans):
        if span.parent < 0:
            documents.append([])
        documents[-1].append(index)
    return documents


def _long(spans: Sequence[Span], document: list[int], device: torch.device | None) -> list[Tile]:
    """Tiles of one document longer than a tile: siblings share a tile while they fit."""
    result: list[Tile] = []
    group: list[int] = []

    def close() -> None:
        if group:
            result.append(_dense(spans, group, ancestors(spans, group[0]), device))
            group.clear()

    for index in document:
        span = spans[index]
        fits = group and spans[group[0]].parent == span.parent and span.end - spans[group[0]].start <= TILE
        if not fits:
            close()
        if span.end - span.start <= TILE:
            group.append(index)
        elif span.parent < 0:
            result.append(Tile(span.start, span.end, ((span.start, span.end),), None, span.end - span.start))
        else:
            result += _blocks(spans, index, device)
    close()
    return result


def _dense(spans: Sequence[Span], group: list[int], seen: tuple[int, ...], device: torch.device | None) -> Tile:
    """One tile for neighbouring segments; `seen` are ancestors outside the tile, visible to all of them."""
    start, end = spans[group[0]].start, spans[group[-1]].end
    if len(group) == 1 and not seen:
        return Tile(start, end, ((start, end),), None, end - start)
    mask = torch.zeros(end - start, end - start, dtype=torch.bool)
    for index in group:
        rows = slice(spans[index].start - start, spans[index].end - start)
        own = rows.stop - rows.start
        mask[rows, rows] = torch.ones(own, own, dtype=torch.bool).tril()
        for parent in ancestors(spans, index):
            if spans[parent].start >= start:
                mask[rows, spans[parent].start - start : spans[parent].end - start] = True
    ranges = tuple((spans[parent].start, spans[parent].end) for parent in seen)
    before = sum(stop - first for first, stop in ranges)
    reach = before + int(mask.sum(1).max())
    mask = torch.cat([torch.ones(end - start, before, dtype=torch.bool), mask], 1).to(device)
    return Tile(start, end, (*ranges, (start, end)), mask, reach)


def _blocks(spans: Sequence[Span], index: int, device: torch.device | None) -> list[Tile]:
    """Tiles of one long child: blocks of queries, each over the parents' keys and its own up to the block's end."""
    span, result = spans[index], []
    ranges = tuple((spans[parent].start, spans[parent].end) for parent in ancestors(spans, index))
    before = sum(stop - first for first, stop in ranges)
    for start in range(span.start, span.end, BLOCK):
        end = min(start + BLOCK, span.end)
        queries = torch.arange(start, end)[:, None]
        mask = torch.ones(end - start, before + end - span.start, dtype=torch.bool)
        mask[:, before:] = torch.arange(span.start, end)[None] <= queries
        reach = before + end - span.start
        result.append(Tile(start, end, (*ranges, (span.start, end)), mask.to(device), reach))
    return result


def _segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    segment_tiles: Sequence[Tile],
    sliding_window: int | None = None,
    **more: object,
) -> tuple[Tensor, None]:
    """Attention of one layer, in transformers' calling convention.

    Args:
        module: the attention layer (unused).
        query: [1, heads, T, head width].
        key: [1, key heads, T, head width]; fewer heads than the query's are repeated.
        value: like `key`.
        attention_mask: must be None: what may be seen is said by the tiles alone.
        scaling: of the scores.
        dropout: must be 0; a ratio of policies is 1 only without it.
        segment_tiles: from `tiles`.
        sliding_window: may be set as long as no chain of segments is longer: then it hides nothing.
        more: what else a layer passes; extras that would change the scores are refused.

    Returns:
        [1, T, heads, head width] and no weights.

    Raises:
        InputError: the layer asks for more than causal attention.
    """
    _refuse(sliding_window, more, segment_tiles)
    if attention_mask is not None or dropout:
        raise ValueError("packed attention takes neither an attention mask nor dropout")
    heads = query.shape[1] // key.shape[1]
    if heads > 1:
        key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    parts = []
    for tile in segment_tiles:
        keys, values = _visible(key, tile.keys), _visible(value, tile.keys)
        queries = query[:, :, tile.start : tile.end]
        parts.append(
            F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=tile.mask, is_causal=tile.mask is None, scale=scaling
            )
        )
    return torch.cat(parts, 2).transpose(1, 2), None


def _refuse(sliding_window: int | None, more: Mapping[str, object], segment_tiles: Sequence[Tile]) -> None:
    extras = [name for name in EXTRAS if more.get(name) is not None]
    if extras:
        what = f"its attention layers use {' and '.join(extras)}, which packed attention does not compute"
        raise InputError("model", what, "Give a model with plain causal attention.")
    longest = max((tile.reach for tile in segment_tiles), default=0)
    if sliding_window is not None and longest > sliding_window:
        what = f"a row of {longest} tokens is longer than the model's sliding window of {sliding_window}"
        raise InputError("model", what, "Lower data.init_args.max_tokens to the window, or give another model.")


def _visible(x: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """The tokens of some ranges; a view where there is only one."""
    parts = [x[:, :, first:stop] for first, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


AttentionInterface.register(NAME, _segment_attention)
# The mask transformers would build is T x T and knows nothing of parents; ours is said by the tiles.
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
