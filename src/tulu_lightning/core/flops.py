"""How much arithmetic a training step needs, as the model defines it: the numerator of MFU.

One multiply and add is 2 FLOPs. A matrix costs 2 a weight and token forward, 2 for its input's gradient and, where it
is trained, 2 for its own (6 in all, 4 if frozen). The head counts only at scored tokens: elsewhere it is not needed.
Attention costs 4 · width forward for each pair of a query and a key that it may see (scores, then values) and twice
that backward: 12 · layers · width · pairs, where causal documents have L (L + 1) / 2 pairs each. Formulas with L² in
that place (PaLM, appendix B) count the half that causal attention never sees.

Recomputing (activation checkpointing, the head's logits), norms, rotary embeddings and padding are not counted.
"""

from typing import NamedTuple

from tulu_lightning.types import Pack

__all__ = ["Shape", "Work", "pack_work", "training_flops"]


class Shape(NamedTuple):
    """What of a model costs arithmetic."""

    matrices: int
    """Weights of the decoder's linear layers."""
    trained: int
    """Of these, those that are trained."""
    head: int
    """Weights of the output head, shared with the embeddings or not: vocabulary · width."""
    head_trained: bool
    attention: int
    """Width of the queries over all heads (usually that of the model), summed over layers."""


class Work(NamedTuple):
    """What of a batch costs arithmetic."""

    tokens: int
    """Tokens of its rows; padding and fillers are none."""
    scored: int
    """Tokens that get a log-prob."""
    pairs: int
    """Pairs of a query and a key that it sees, itself included."""


def pack_work(pack: Pack) -> Work:
    """The work in a pack; none in a filler.

    Example: a pair with a prompt of 3 tokens and answers of 2 and 2 has (1 + 2 + 3) + 2 (4 + 5) = 24 pairs.
    """
    if not pack.rows:
        return Work(0, 0, 0)
    tokens, pairs = pack.tokens_T.numel() - pack.padding, 0
    seen: list[int] = []
    for span in pack.spans:
        own, before = span.end - span.start, seen[span.parent] if span.parent >= 0 else 0
        seen.append(before + own)
        if span.start < tokens:
            pairs += own * before + own * (own + 1) // 2
    return Work(tokens, pack.target_N.numel(), pairs)


def training_flops(shape: Shape, work: Work) -> float:
    """FLOPs of one forward and backward pass.

    Example: 10 weights, all trained, a head of 100 that is, and queries 4 wide in one layer; 3 tokens in a row, 2 of
    them scored: 6 · 10 · 3 + 6 · 100 · 2 + 12 · 4 · 6 = 1668.
    """
    body = (4 * shape.matrices + 2 * shape.trained) * work.tokens
    head = (4 + 2 * shape.head_trained) * shape.head * work.scored
    return float(body + head + 12 * shape.attention * work.pairs)
