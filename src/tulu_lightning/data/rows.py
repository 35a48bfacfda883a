"""The rows of a mixture: an index of (source, kept row), however often a row is repeated, in a few arrays."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from tulu_lightning.data.intake import Counts
from tulu_lightning.data.store import Store
from tulu_lightning.types import Document

__all__ = ["Array", "Documents", "Mixed", "SourceRows"]

Array = np.ndarray[Any, np.dtype[Any]]


class SourceRows(NamedTuple):
    """What was kept of one source, in the order in which it was tried."""

    name: str
    items: Sequence[Any]
    """Documents or prompts."""
    lengths: Array
    """Tokens of each; int64."""
    trained: Array
    """Trained tokens of each."""
    counts: Counts
    digest: str
    """Hash of the items. Hexadecimal."""
    fingerprint: str
    """Hash of the source's rows as they were read. Hexadecimal."""
    repeating: int = 0
    """Rows that decontamination took out before; `counts` knows nothing of them."""


@dataclass(frozen=True, eq=False)
class Mixed(Sequence[Any]):
    """Sources one after the other; rows are numbered from 0 over all of them."""

    sources: tuple[SourceRows, ...]
    picks: tuple[Array, ...]
    """For each source, the kept row behind each row of the mixture; int64."""

    def __len__(self) -> int:
        return len(self.places)

    @cached_property
    def source_numbers(self) -> Array:
        """Index of each row's source; int32."""
        return np.repeat(np.arange(len(self.sources), dtype=np.int32), [len(pick) for pick in self.picks])

    @cached_property
    def places(self) -> Array:
        """Each row's place among the kept rows of its source; int64."""
        return np.concatenate(self.picks)

    @cached_property
    def lengths(self) -> Array:
        """Tokens of each row; int64."""
        return np.concatenate([part.lengths[pick] for part, pick in zip(self.sources, self.picks, strict=True)])

    def __getitem__(self, index: Any) -> Any:
        """The item behind a row, or the list of those behind a slice."""
        if isinstance(index, slice):
            return [self[row] for row in range(len(self))[index]]
        return self.sources[self.source_numbers[index]].items[int(self.places[index])]

    def digest(self) -> str:
        """Hash of the rows as they are trained on, in order: of what was kept of each source, and of the repeats."""
        digest = hashlib.sha256()
        for part, pick in zip(self.sources, self.picks, strict=True):
            digest.update(f"{part.digest} {len(pick)}\n".encode())
            if not np.array_equal(pick, np.arange(part.counts.kept)):
                digest.update(np.ascontiguousarray(pick, "<i8").data)
        return digest.hexdigest()


class Documents(Mixed):
    """A mixture whose items lie in stores: a `Sequence[Document]` of which only arrays are in memory."""

    @property
    def stores(self) -> tuple[Store, ...]:
        """The store of each source."""
        return tuple(part.items for part in self.sources)  # type: ignore[misc]

    def __getitem__(self, index: Any) -> Document | Any:
        """One document, freshly made, or the list of a slice."""
        return super().__getitem__(index)

    @cached_property
    def weight_sums(self) -> Array:
        """Sum of the weights of each row's scored tokens; float64."""
        pairs = zip(self.stores, self.picks, strict=True)
        return np.concatenate([store.weight_sums[pick] for store, pick in pairs])

    @property
    def extent(self) -> tuple[int, int, int]:
        """Lowest token id, highest token id, tokens of the longest chain of segments: known without reading a row."""
        known = [store.summary for store in self.stores]
        return (
            min(each.min_id for each in known),
            max(each.max_id for each in known),
            max(each.longest_chain for each in known),
        )
