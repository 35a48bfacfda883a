"""Sequences to be scored, as packs in which what several of them begin with stands once.

The answers of a multiple choice share their question, and the questions of a subject its worked examples: four in five
tokens of MMLU's five-shot letters. Segments of any depth say so (`types.Segment`), and attention over segments is exact.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from tulu_lightning.types import Pack, Span

__all__ = ["Pair", "prefix_pack", "prefix_parts"]

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt, which is not empty, and of the response that is scored."""
Ids = tuple[int, ...]

LEAST = 16
"""Tokens that get a segment of their own when they are shared: shorter ones fill the tiles of attention badly."""


class _Node(NamedTuple):
    """Tokens [first, end) of a sequence and of all that begin with them; they lie at `at` in the pack."""

    sequence: int
    first: int
    end: int
    at: int
    parent: int


def prefix_pack(pairs: Sequence[Pair], least: int = LEAST) -> Pack:
    """A pack whose scored tokens are the responses', in the order of the pairs.

    A response's last token predicts nothing that is asked for and is left out: answers of one token cost their prompt.

    Example: ([5, 6], [7]) and ([5, 6], [8]) become the tokens 5 and 6; both answers are predicted from 6.

    Args:
        pairs: at least one.
        least: fewest tokens that are shared.

    Returns:
        Segments are in `segment_N` those of the tokens that predict; weights are 1.
    """
    read = [_read(pair) for pair in pairs]
    sequences = sorted(set(read))
    nodes, last = _tree(sequences, least)
    leaf = dict(zip(sequences, last, strict=True))
    sources, segments = list[int](), list[int]()
    for (prompt, response), ids in zip(pairs, read, strict=True):
        for at, segment in _places(nodes, leaf[ids], len(prompt) - 1, len(prompt) + len(response) - 1):
            sources += at
            segments += [segment] * len(at)
    tokens = [token for node in nodes for token in sequences[node.sequence][node.first : node.end]]
    positions = [position for node in nodes for position in range(node.first, node.end)]
    return Pack(
        tokens_T=torch.tensor(tokens),
        positions_T=torch.tensor(positions),
        spans=tuple(Span(node.at, node.at + node.end - node.first, node.parent) for node in nodes),
        source_N=torch.tensor(sources),
        target_N=torch.tensor([token for _, response in pairs for token in response]),
        weight_N=torch.ones(len(sources)),
        segment_N=torch.tensor(segments),
        rows=tuple(range(len(pairs))),
    )


def prefix_parts(pairs: Sequence[Pair], tokens: int, least: int = LEAST) -> Iterator[list[int]]:
    """Numbers of the pairs that make a pack of about so many tokens together; a longer one is alone.

    Neighbours in lexicographic order share most, so they come together. No pairs, no packs.
    """
    read = [_read(pair) for pair in pairs]
    part, held = list[int](), 0
    for i in sorted(range(len(pairs)), key=lambda i: read[i]):
        shared = _agree(read[part[-1]], read[i]) if part else 0
        new = len(read[i]) - (shared if shared >= least else 0)
        if part and held + new > tokens:
            yield part
            part, held, new = [], 0, len(read[i])
        part.append(i)
        held += new
    if part:
        yield part


def _read(pair: Pair) -> Ids:
    """What a model must read of a pair."""
    return (*pair[0], *pair[1][:-1])


def _agree(a: Ids, b: Ids) -> int:
    """Tokens that both begin with."""
    return next((i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def _tree(sequences: Sequence[Ids], least: int) -> tuple[list[_Node], list[int]]:
    """Nodes of sequences that are sorted and distinct, parents first and documents in one piece; where each sequence ends."""
    nodes, last, at = list[_Node](), [-1] * len(sequences), 0
    todo = [(0, len(sequences), 0, -1)]  # sequences [low, high) whose first tokens lie in a node and above it
    while todo:
        low, high, start, parent = todo.pop()
        alone, first = high - low == 1, sequences[low]
        agreed = len(first) if alone else _agree(first, sequences[high - 1])  # what these two share, all do
        if alone or agreed - start >= least:
            nodes.append(_Node(low, start, agreed, at, parent))
            at += agreed - start
            start, parent = agreed, len(nodes) - 1
        below = []
        if len(first) == agreed:  # it ends here, and comes before what it is the beginning of
            if start == agreed:
                last[low] = parent
            else:
                below.append((low, low + 1, start, parent))
            low += 1
        for _, group in groupby(ids[agreed] for ids in sequences[low:high]):
            below.append((low, low := low + len(list(group)), start, parent))
        todo += reversed(below)
    return nodes, last


def _places(nodes: Sequence[_Node], node: int, first: int, end: int) -> list[tuple[range, int]]:
    """Where tokens [first, end) of a sequence lie that ends in a node, piece by piece, and in which segment."""
    pieces = []
    while node >= 0 and first < end:
        held = nodes[node]
        begin = max(first, held.first)
        if begin < end:
            pieces.append((range(held.at + begin - held.first, held.at + end - held.first), node))
        end, node = min(end, held.first), held.parent
    return pieces[::-1]
