"""Attention over packs by the fused kernels of a GPU: flash attention for plain documents, flex attention for trees.

Both run in the values' dtype and take fewer key heads than query heads as they are.
"""

from collections.abc import Sequence
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from tulu_lightning.core.packing import ancestors
from tulu_lightning.core.visibility import sees, visibility
from tulu_lightning.types import Span

__all__ = ["Flex", "Varlen"]

BLOCK = 128
"""Queries and keys of one block of a flex mask."""
OPTIONS = {"BACKEND": "TRITON"}
"""Left to itself, torch takes a kernel for decoding below 128 queries, which then does not compile where queries times the
heads of a group exceed a block: packs of 65 to 127 tokens with groups of two, 17 to 127 with groups of eight."""


class Varlen:
    """Flash attention over documents end to end (`torch.nn.attention.varlen`): for packs without shared prompts."""

    def __init__(self, spans: Sequence[Span], device: torch.device | None = None) -> None:
        """Note the documents' ends.

        Raises:
            ValueError: a segment continues another one; the kernel knows nothing of parents.
        """
        if any(span.parent >= 0 for span in spans):
            raise ValueError("varlen attention takes documents of one segment each")
        self.edges = torch.tensor([0, *(span.end for span in spans)], dtype=torch.int32, device=device)
        self.longest = max(span.end - span.start for span in spans)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one layer; arguments and result as `SdpaTiles`."""
        attend, asks = _varlen()
        q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
        grouped = {"enable_gqa": True} if asks and q.shape[1] != k.shape[1] else {}
        kept: Any = attend(
            q,
            k,
            v,
            self.edges,
            self.edges,
            self.longest,
            self.longest,
            scale=scale,
            window_size=(-1, 0),  # causal
            **grouped,
        )
        return kept[None]


class Flex:
    """Flex attention with the pack's own mask; blocks that nobody sees are never computed."""

    def __init__(self, spans: Sequence[Span], device: torch.device | None = None) -> None:
        """Build the block mask from the segments' edges alone; no T x T mask is made."""
        from torch.nn.attention.flex_attention import BlockMask

        tokens = spans[-1].end
        seen = visibility(spans, device)
        # A block may reach beyond the last token.
        seen = type(seen)(*(torch.nn.functional.pad(x, (0, -tokens % BLOCK)) for x in seen))

        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sees(seen, query, key)

        some, full = blocks(spans)
        self.mask = BlockMask.from_kv_blocks(
            *_indices(some & ~full, device),
            *_indices(full, device),
            BLOCK_SIZE=BLOCK,
            mask_mod=mask_mod,
            seq_lengths=(tokens, tokens),
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one layer; arguments and result as `SdpaTiles`."""
        q, k, v = (x.to(value.dtype) for x in (query, key, value))
        attend, options = (_compiled(), OPTIONS) if q.is_cuda else (_plain(), None)
        grouped = q.shape[1] != k.shape[1]
        out = attend(q, k, v, block_mask=self.mask, scale=scale, enable_gqa=grouped, kernel_options=options)
        return out.transpose(1, 2)


def blocks(spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """Which blocks hold a pair (query, key) that is seen, and which hold no other; bool [blocks, blocks] each."""
    count = -(-spans[-1].end // BLOCK)
    some, full = torch.zeros(count, count, dtype=torch.bool), torch.zeros(count, count, dtype=torch.bool)
    for index, span in enumerate(spans):
        touched, inside = _touched(span), _inside(span)
        for parent in ancestors(spans, index):
            some[touched, _touched(spans[parent])] = True
            full[inside, _inside(spans[parent])] = True
        own = touched.stop - touched.start
        some[touched, touched] |= torch.ones(own, own, dtype=torch.bool).tril()
        own = inside.stop - inside.start
        full[inside, inside] |= torch.ones(own, own, dtype=torch.bool).tril(-1)
    return some, full


def _touched(span: Span) -> slice:
    return slice(span.start // BLOCK, -(-span.end // BLOCK))


def _inside(span: Span) -> slice:
    first = -(-span.start // BLOCK)
    return slice(first, max(first, span.end // BLOCK))


def _indices(chosen: Tensor, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, and their numbers first: int32 [1, 1, blocks (, blocks)]."""
    counts = chosen.sum(-1, dtype=torch.int32)
    numbers = chosen.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts[None, None].to(device), numbers[None, None].to(device)


@cache
def _varlen() -> tuple[Any, bool]:
    """The kernel, and whether it wants to be told of grouped heads; torch 2.11's takes them without a word."""
    from torch.nn.attention.varlen import varlen_attn  # not in every build of torch

    return varlen_attn, "enable_gqa" in signature(varlen_attn).parameters


def _plain() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@cache
def _compiled() -> Any:
    """The fused kernel; torch uses the unfused T x T computation unless it is compiled."""
    return torch.compile(_plain())
