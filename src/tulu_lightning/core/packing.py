"""Documents in, one token axis out.

A document is a tree of segments (`types.Segment`). Packing lays the segments of many documents end to end, notes for
each the tokens it may see (its own, causally, and those of its chain of parents), and lists the places that predict a
scored token. SFT packs one segment a document, DPO a prompt with two children, RL a prompt with one child a sample.

Padding does not exist, except where a compiled model wants few shapes: then it is one last segment of its own, that no
document sees and nobody reads. Left out on purpose: splitting a document over packs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tulu_lightning.types import Document, Pack, Segment, Span

__all__ = ["ancestors", "filler", "length", "loss_weight", "pack", "scored_tokens"]


def length(document: Document) -> int:
    """Tokens that a document occupies in a pack: every segment once, however many children share it."""
    return sum(segment.ids_L.numel() for segment in document.segments)


def scored_tokens(document: Document) -> int:
    """Number of tokens that get a log-prob. The first token of a document has no predecessor and never does."""
    return sum(int((weights_L > 0).sum()) for weights_L in map(_scorable, document.segments))


def loss_weight(document: Document) -> float:
    """Sum of the weights of a document's scored tokens: its share of a token-weighted denominator."""
    return float(sum(_scorable(segment).sum() for segment in document.segments))


def _scorable(segment: Segment) -> Tensor:
    return segment.weights_L[1:] if segment.parent < 0 else segment.weights_L


def ancestors(spans: Sequence[Span], index: int) -> tuple[int, ...]:
    """Indices of the segments that segment `index` continues, the oldest first."""
    chain: list[int] = []
    parent = spans[index].parent
    while parent >= 0:
        chain.append(parent)
        parent = spans[parent].parent
    return tuple(reversed(chain))


def pack(documents: Sequence[Document], rows: Sequence[int] = (), pad_to: int = 0, pad_id: int = 0) -> Pack:
    """Lay documents end to end.

    Args:
        documents: at least one; parents before children within each.
        rows: data-set row of each document, kept for records and per-row caches.
        pad_to: pad to a multiple of so many tokens with one segment that no row owns; 0 = no padding.
        pad_id: the token to pad with.

    Returns:
        The pack; scored tokens are in the order of documents, segments and tokens.

    Raises:
        ValueError: no document, an empty segment, or a parent that does not come before its child.
    """
    if not documents:
        raise ValueError("a pack needs at least one document")
    tokens, positions, spans = [], [], []
    sources, targets, weights, segments = [], [], [], []
    start = 0
    for document in documents:
        base, ends = len(spans), []
        for index, segment in enumerate(document.segments):
            count = segment.ids_L.numel()
            if not count or not -1 <= segment.parent < index:
                raise ValueError(f"segment {index}: {count} tokens, parent {segment.parent}; a parent comes first")
            first = ends[segment.parent] if segment.parent >= 0 else 0
            span = Span(start, start + count, base + segment.parent if segment.parent >= 0 else -1)
            tokens.append(segment.ids_L)
            positions.append(torch.arange(first, first + count))
            # Hidden state that predicts token i: the token before it, which for a child's first is its parent's last.
            source_L = torch.arange(start - 1, start + count - 1)
            source_L[0] = spans[span.parent].end - 1 if span.parent >= 0 else -1
            scored_L = (segment.weights_L > 0) & (source_L >= 0)
            sources.append(source_L[scored_L])
            targets.append(segment.ids_L[scored_L])
            weights.append(segment.weights_L[scored_L])
            segments.append(torch.full((int(scored_L.sum()),), len(spans)))
            spans.append(span)
            ends.append(first + count)
            start += count
    padding = -start % pad_to if pad_to else 0
    if padding:
        tokens.append(torch.full((padding,), pad_id))
        positions.append(torch.zeros(padding, dtype=torch.int64))  # within any model's positions, however long
        spans.append(Span(start, start + padding, -1))
    return Pack(
        tokens_T=torch.cat(tokens).long(),
        positions_T=torch.cat(positions),
        spans=tuple(spans),
        source_N=torch.cat(sources),
        target_N=torch.cat(targets).long(),
        weight_N=torch.cat(weights).float(),
        segment_N=torch.cat(segments),
        rows=tuple(rows),
        padding=padding,
    )


def filler(document: Document, pad_to: int = 0, pad_id: int = 0) -> Pack:
    """A pack that computes but counts for nothing: for a rank that is one micro-batch short.

    Collectives need every rank to run the same number of forward and backward passes. Arguments as in `pack`.
    """
    packed = pack([document], (), pad_to, pad_id)
    return packed._replace(weight_N=torch.zeros_like(packed.weight_N))
