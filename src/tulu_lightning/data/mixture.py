"""Which rows of a source go into a mixture, and how often. (Stand-in.)"""

import hashlib
from collections.abc import Sequence

import torch

from tulu_lightning.data.sources import Source

__all__ = ["order", "repeats", "wanted"]


def _shuffled(source: Source, total: int, seed: int, what: str) -> Sequence[int]:
    digest = hashlib.sha256(f"{what} {seed} {source.name} {total}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(total, generator=generator).tolist()


def order(source: Source, total: int, seed: int) -> Sequence[int]:
    """Raw row indices in the order in which they are tried."""
    if source.fraction is not None:
        return _shuffled(source, total, seed, "order")[: round(source.fraction * total)]
    if source.count is not None or source.cap is not None:
        return _shuffled(source, total, seed, "order")
    return range(total)


def wanted(source: Source, total: int) -> int | None:
    """Stop after so many kept rows; None tries all."""
    return source.count if source.count is not None else source.cap


def repeats(source: Source, kept: int, seed: int) -> Sequence[int]:
    """Indices into the kept rows, up-sampling applied."""
    whole = int(source.upsample)
    part = round((source.upsample - whole) * kept)
    if whole == 1 and not part:
        return range(kept)
    return [*list(range(kept)) * whole, *_shuffled(source, kept, seed, "repeats")[:part]]
