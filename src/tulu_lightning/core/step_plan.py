"""Which examples make up step k, and how they are cut over ranks and micro-batches.

The *set* of examples of a step is a function of (seed, step) alone: neither the number of ranks nor the size of a
micro-batch enters it. So a run that changes machines, or resumes, goes on at step k with the same content.

The cut is the second half: every rank gets the same number of micro-batches (sharded collectives need that), each at
most `micro_tokens` long unless one example alone is longer, and the ranks' costs (tokens plus attention) are level.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["StepPlan", "cut", "mix_seed"]

ATTENTION_TOKENS = 4096.0
"""Length at which a token's attention costs about as much as its matrix products (12·hidden, Llama-like shapes)."""


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
    """Relative cost of one document of that many tokens: linear layers plus causal attention."""
    return length * (1.0 + length / ATTENTION_TOKENS)


def cut(lengths: Sequence[int], micro_tokens: int, ranks: int = 1) -> list[list[tuple[int, ...]]]:
    """Cut items into micro-batches of at most `micro_tokens` tokens and deal them over ranks.

    Best-fit by decreasing length says how few micro-batches will do; the items are then spread evenly over that many,
    and dealt by decreasing cost to the least loaded rank. An item longer than the limit gets one of its own.

    Args:
        lengths: tokens of each item.
        micro_tokens: limit of one micro-batch, in tokens.
        ranks: number of ranks.

    Returns:
        For each rank its micro-batches, as tuples of indices into `lengths`; all ranks have the same number. An empty
        tuple asks for a filler.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins = _best_fit(order, lengths, micro_tokens)
    each = max(1, -(-len(bins) // ranks))
    # The fewest micro-batches are known now; spread the items over that many evenly, if that still fits.
    bins = _level(order, lengths, micro_tokens, each * ranks) or bins
    costs = [sum(cost(lengths[i]) for i in items) for items in bins]
    dealt: list[list[tuple[int, ...]]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for b in sorted(range(len(bins)), key=lambda b: (-costs[b], b)):
        rank = min((r for r in range(ranks) if len(dealt[r]) < each), key=lambda r: (load[r], r))
        dealt[rank].append(tuple(sorted(bins[b])))
        load[rank] += costs[b]
    return [micros + [()] * (each - len(micros)) for micros in dealt]


def _best_fit(order: Sequence[int], lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Each item, longest first, into the fullest micro-batch that still takes it."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item in order:
        fits = [b for b in range(len(bins)) if room[b] >= lengths[item]]
        best = min(fits, key=lambda b: room[b], default=len(bins))
        if best == len(bins):
            bins.append([])
            room.append(max(micro_tokens, lengths[item]))
        bins[best].append(item)
        room[best] -= lengths[item]
    return bins


def _level(order: Sequence[int], lengths: Sequence[int], micro_tokens: int, count: int) -> list[list[int]] | None:
    """Each item, longest first, into the cheapest of `count` micro-batches; None where one gets too long."""
    bins: list[list[int]] = [[] for _ in range(count)]
    tokens, load = [0] * count, [0.0] * count
    for item in order:
        fits = [b for b in range(count) if not bins[b] or tokens[b] + lengths[item] <= micro_tokens]
        if not fits:
            return None
        best = min(fits, key=lambda b: (load[b], b))
        bins[best].append(item)
        tokens[best] += lengths[item]
        load[best] += cost(lengths[item])
    return [items for items in bins if items]


@dataclass(frozen=True)
class StepPlan:
    """The whole run's batches as a pure function of the step.

    The rows of an epoch are shuffled by (seed, epoch) and taken `examples_per_step` at a time; the last step of an
    epoch may be short, and no row is dropped.

    Example: 5 rows, 2 a step, 2 epochs: steps 0 and 1 have two rows, step 2 has one, step 3 starts epoch 1.
    """

    lengths: Sequence[int] | Tensor
    """Tokens of each row."""
    examples_per_step: int
    """Rows of one optimiser step, over all ranks (the paper's effective batch)."""
    micro_tokens: int
    """Limit of one micro-batch on one rank, in tokens."""
    seed: int = 0
    epochs: int = 1
    max_steps: int | None = None
    """Stop here, if that is earlier than the last epoch's end (or go on over more epochs when it is later)."""
    world_size: int = 1
    _order: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("examples_per_step", "micro_tokens", "epochs", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
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
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of a run of {self.total_steps}")
        epoch, within = divmod(step, self.steps_per_epoch)
        order = self._epoch_order(epoch)
        return tuple(order[within * self.examples_per_step : (within + 1) * self.examples_per_step].tolist())

    def micro_batches(self, step: int, rank: int = 0) -> list[tuple[int, ...]]:
        """Rows of each micro-batch of one rank at `step`; an empty tuple asks for a filler."""
        rows = self.examples(step)
        dealt = cut([int(self.lengths[row]) for row in rows], self.micro_tokens, self.world_size)
        return [tuple(rows[i] for i in items) for items in dealt[rank]]

    def _epoch_order(self, epoch: int) -> Tensor:
        if epoch not in self._order:
            self._order.clear()  # one epoch is enough: steps come in order
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            self._order[epoch] = torch.randperm(len(self.lengths), generator=generator)
        return self._order[epoch]
