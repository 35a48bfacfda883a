"""Who sees whom in a pack: one rule, written as two numbers per token.

A token sees its own segment up to itself, and the segments of its chain of parents. Number the segments of a pack in
the order in which a walk from parents to children enters them; a segment's descendants then are those numbered from
its own `enter` up to its `leave`. So token q sees token k exactly if

    enter[k] <= enter[q] < leave[k]  and  k <= q

(parents stand before their children, so `k <= q` takes nothing from a chain). Two arrays of T numbers stand for a mask
of T x T.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tulu_lightning.types import Span

__all__ = ["Visibility", "sees", "visibility"]


class Visibility(NamedTuple):
    """The two numbers of every token. Example: a prompt (2 tokens) with two children of 1: enter 0 0 1 2, leave 3 3 2 3."""

    enter_T: Tensor
    """int32, number of the token's segment."""
    leave_T: Tensor
    """int32, one more than the largest number among the segment and its descendants."""


def visibility(spans: Sequence[Span], device: torch.device | None = None) -> Visibility:
    """Number the segments of a pack; spans lie end to end, parents before children."""
    children: list[list[int]] = [[] for _ in spans]
    roots = []
    for index, span in enumerate(spans):
        (roots if span.parent < 0 else children[span.parent]).append(index)
    enter, leave = [0] * len(spans), [0] * len(spans)
    waiting, number = roots[::-1], 0
    while waiting:
        index = waiting.pop()
        enter[index] = number
        number += 1
        waiting += reversed(children[index])
    for index in sorted(range(len(spans)), key=lambda i: -enter[i]):  # descendants before their parents
        leave[index] = max([enter[index] + 1, *(leave[child] for child in children[index])])
    lengths_S = torch.tensor([span.end - span.start for span in spans])
    per_token = torch.tensor([enter, leave], dtype=torch.int32).repeat_interleave(lengths_S, 1)
    enter_T, leave_T = per_token.to(device)
    return Visibility(enter_T, leave_T)


def sees(seen: Visibility, query: Tensor, key: Tensor) -> Tensor:
    """Whether token `query` sees token `key`; index tensors that broadcast together, bool of their joint shape."""
    entered = seen.enter_T[query]
    return (seen.enter_T[key] <= entered) & (entered < seen.leave_T[key]) & (key <= query)
