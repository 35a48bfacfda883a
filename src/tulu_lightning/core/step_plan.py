"""Which examples make up step k, and how they are cut over ranks and micro-batches.

The *set* of examples of a step is a function of (seed, step) alone: neither the number of ranks nor the size of a
micro-batch enters it. So a run that changes machines, or resumes, goes on at step k with the same content.

The cut is the second half: every rank gets the same number of micro-batches (sharded collectives need that), each at
most `micro_tokens` long unless one example alone is longer, and the ranks' costs (tokens plus attention) are level.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace

import torch
from torch import Tensor

__all__ = ["StepPlan", "cut", "mix_seed"]

ATTENTION_TOKENS = 16384.0
"""Length of a document whose attention costs as much as its matrix products. In operations that is 12 x hidden for
Llama-like shapes: 49,152 for 8B, of which a kernel at two thirds of the products' speed leaves 32,000; for SmolLM2-135M
on a CPU it was measured as about 4,000 in fp32. One number between, as no plan may depend on the model."""


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several small integers, so that streams such as (seed, epoch) and (seed, step) never meet.

    SplitMix64's finaliser over a running state; the order of the parts matters.
    """
    state, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    for part in parts:
        state = (state ^ (part & mask)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        state = (state ^ state >> 31) + 0x9E3779B97F4A7C15 & mask
    return state >> 1


def cost(length: int) -> float:
    """Relative cost of one document of that many tokens: linear layers plus its causal attention to itself alone."""
    return length * (1.0 + length / ATTENTION_TOKENS)


def cut(lengths: Sequence[int], micro_tokens: int, ranks: int = 1, pad_to: int = 0) -> list[list[tuple[int, ...]]]:
    """Cut items into micro-batches of at most `micro_tokens` tokens and deal them over ranks.

    There are as few micro-batches as best fit finds (often provably the fewest), rounded up to the same number on
    every rank. Where shapes may vary, the items are then spread evenly over that many. Where they may not (`pad_to`),
    even is the wrong aim, as every micro-batch pays for its padding: best fit fills one after the other, and the slack
    gathers in the last. An item longer than the limit gets a micro-batch of its own.

    Ranks run their j-th micro-batches in lock step, so the j-th ones of all ranks are neighbours in cost; among them
    the dearest goes to the rank that has least so far.

    Args:
        lengths: tokens of each item.
        micro_tokens: limit of one micro-batch, in tokens.
        ranks: number of ranks.
        pad_to: micro-batches will be padded to a multiple of so many tokens, and should be filled; 0 = no padding.

    Returns:
        For each rank its micro-batches, as tuples of indices into `lengths`; all ranks have the same number. An empty
        tuple asks for a filler.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins = (
        _filled(order, lengths, micro_tokens, ranks, pad_to) if pad_to else _even(order, lengths, micro_tokens, ranks)
    )
    each = max(1, -(-len(bins) // ranks))
    costs = [sum(map(cost, [lengths[i] for i in items])) for items in bins]
    by_cost = sorted(range(len(bins)), key=lambda b: (-costs[b], b))
    dealt: list[list[tuple[int, ...]]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for first in range(0, len(by_cost), ranks):
        idle_first = sorted(range(ranks), key=lambda r: (load[r], r))
        for rank, b in zip(idle_first, by_cost[first : first + ranks], strict=False):
            dealt[rank].append(tuple(sorted(bins[b])))
            load[rank] += costs[b]
    return [micros + [()] * (each - len(micros)) for micros in dealt]


def _even(order: Sequence[int], lengths: Sequence[int], micro_tokens: int, ranks: int) -> list[list[int]]:
    """Micro-batches of even cost, as few as `_best_fit` needs, rounded up to whole rounds of the ranks."""
    alone = sum(lengths[i] > micro_tokens for i in order)
    rest = sum(lengths[i] for i in order[alone:])
    fewest = _rounded(alone + -(-rest // micro_tokens), ranks)  # none can do with less
    bins = _level(order, lengths, micro_tokens, fewest)
    if bins is None:
        packed = _best_fit(order, lengths, micro_tokens)
        bins = _level(order, lengths, micro_tokens, _rounded(len(packed), ranks)) or packed
    return [items for items in bins if items]


def _filled(
    order: Sequence[int], lengths: Sequence[int], micro_tokens: int, ranks: int, pad_to: int
) -> list[list[int]]:
    """Micro-batches filled by best fit; with several ranks, so that they wait least for each other.

    For one rank that is best fit to the limit. Several would wait for the slack to gather on one of them, so they take
    best fit to a lower limit, or even micro-batches after all if those are cheaper and lose at most 2% to padding.
    """
    bins = _best_fit(order, lengths, micro_tokens)
    if ranks == 1:
        return bins
    count = _rounded(len(bins), ranks)
    bins = _tightest(order, lengths, -(-sum(lengths) // count), micro_tokens, count, pad_to)
    even = [items for items in _level(order, lengths, micro_tokens, count) or [] if items]
    padding = sum(-sum([lengths[i] for i in items]) % pad_to for items in even)
    if not even or padding > 0.02 * sum(lengths):
        return bins

    def waited(bins: list[list[int]]) -> float:
        """What one rank pays when every round lasts as long as its dearest micro-batch."""
        sizes = ([lengths[i] for i in items] for items in bins)
        costs = sorted((sum(map(cost, part)) + -sum(part) % pad_to for part in sizes), reverse=True)
        return sum(costs[::ranks])

    return min([bins, even], key=waited)


def _rounded(count: int, ranks: int) -> int:
    return max(1, -(-count // ranks)) * ranks


def _tightest(
    order: Sequence[int], lengths: Sequence[int], low: int, high: int, count: int, grain: int
) -> list[list[int]]:
    """Best fit to the lowest limit in (low, high], in steps of `grain`, that needs no more than `count` micro-batches.

    `high` is known to do. Best fit is not monotonic in its limit, so "lowest" is as a bisection finds it.
    """
    bins = _best_fit(order, lengths, high)
    below, above = max(0, -(-low // grain) - 1), -(-high // grain)
    while above - below > 1:
        middle = (below + above) // 2
        tried = _best_fit(order, lengths, middle * grain)
        if len(tried) <= count:
            bins, above = tried, middle
        else:
            below = middle
    return bins


def _best_fit(order: Sequence[int], lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Each item, longest first, into the fullest micro-batch that still takes it."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, micro-batch) in order; full ones are left out
    for item in order:
        size = lengths[item]
        at = bisect_left(rooms, (size, 0))
        if at < len(rooms):
            room, best = rooms.pop(at)
            bins[best].append(item)
        else:
            room, best = max(micro_tokens, size), len(bins)
            bins.append([item])
        if room > size:
            insort(rooms, (room - size, best))
    return bins


def _level(order: Sequence[int], lengths: Sequence[int], micro_tokens: int, count: int) -> list[list[int]] | None:
    """Each item, longest first, into the cheapest of `count` micro-batches that takes it; None where none does."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0.0, b, 0) for b in range(count)]  # (cost, micro-batch, tokens)
    for item in order:
        size = lengths[item]
        aside = []
        while heap and heap[0][2] and heap[0][2] + size > micro_tokens:
            aside.append(heappop(heap))
        if not heap:
            return None
        load, best, tokens = heap[0]
        bins[best].append(item)
        heapreplace(heap, (load + cost(size), best, tokens + size))
        for entry in aside:
            heappush(heap, entry)
    return bins


@dataclass(frozen=True)
class StepPlan:
    """The whole run's batches as a pure function of the step.

    The rows of an epoch are shuffled by (seed, epoch) and taken `examples_per_step` at a time; the last step of an
    epoch may be short, and no row is dropped.

    Example: 5 rows, 2 a step, 2 epochs: steps 0 and 1 have two rows, step 2 has one, step 3 starts epoch 1.
    """

    lengths: Sequence[int] | Tensor
    """Tokens of each row: a list, a tensor, or any array that gives an integer per index. It is not copied."""
    examples_per_step: int
    """Rows of one optimiser step, over all ranks (the paper's effective batch)."""
    micro_tokens: int
    """Limit of one micro-batch on one rank, in tokens."""
    seed: int = 0
    epochs: int = 1
    max_steps: int | None = None
    """Stop here, if that is earlier than the last epoch's end (or go on over more epochs when it is later)."""
    world_size: int = 1
    pad_to: int = 0
    """Fill the micro-batches, which will be padded to a multiple of so many tokens; 0 = no padding. See `cut`."""
    _order: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("examples_per_step", "micro_tokens", "epochs", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.pad_to < 0 or (self.pad_to and self.micro_tokens % self.pad_to):
            raise ValueError(f"pad_to is {self.pad_to}; it must divide micro_tokens ({self.micro_tokens}), or be 0")
        if not len(self.lengths):
            raise ValueError("a step plan needs at least one row")

    @property
    def steps_per_epoch(self) -> int:
        """Steps that one pass over the rows takes."""
        return -(-len(self.lengths) // self.examples_per_step)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.epochs if self.max_steps is None else self.max_steps

    def examples(self, step: int) -> tuple[int, ...]:
        """Rows of global step `step` (from 0), the same for every world size and micro-batch size.

        Raises:
            IndexError: a step outside the run.
        """
        return tuple(self._rows(step).tolist())

    def ranks(self, step: int) -> list[list[tuple[int, ...]]]:
        """Rows of each micro-batch of every rank at `step`; an empty tuple asks for a filler."""
        index = self._rows(step)
        rows = index.tolist()
        if isinstance(self.lengths, Tensor):
            lengths = self.lengths[index].tolist()
        else:
            lengths = [int(self.lengths[row]) for row in rows]
        dealt = cut(lengths, self.micro_tokens, self.world_size, self.pad_to)
        return [[tuple([rows[i] for i in items]) for items in micros] for micros in dealt]

    def micro_batches(self, step: int, rank: int = 0) -> list[tuple[int, ...]]:
        """Rows of each micro-batch of one rank at `step`; an empty tuple asks for a filler."""
        return self.ranks(step)[rank]

    def _rows(self, step: int) -> Tensor:
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of a run of {self.total_steps}")
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._epoch_order(epoch)[within * self.examples_per_step : (within + 1) * self.examples_per_step]

    def _epoch_order(self, epoch: int) -> Tensor:
        if epoch not in self._order:
            self._order.clear()  # one epoch is enough: steps come in order
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            self._order[epoch] = torch.randperm(len(self.lengths), generator=generator)
        return self._order[epoch]
