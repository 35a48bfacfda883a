"""Tokenised documents on disk: flat arrays, mapped into memory, so that a row costs nothing until it is asked for.

A store is a folder of files without headers, one array each. Token ids lie end to end; weights are kept as runs of
equal weight (a chat has two a turn), which is exact for any weight and small. Everything that a start must know of all
rows (how many, their lengths, the range of their ids) is beside them, so no start has to read them all.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch

from tulu_lightning.types import Document, Segment

__all__ = ["Part", "Store", "Summary", "Writer", "expected_sizes"]

Array = np.ndarray[Any, np.dtype[Any]]


class Part(NamedTuple):
    """A segment as plain numbers, before it is written."""

    ids: Sequence[int]
    weights: Sequence[float]
    """Loss weight of each token."""
    parent: int = -1
    """As in `types.Segment`."""


@dataclass(frozen=True)
class Summary:
    """What is known of a store without reading it."""

    rows: int = 0
    segments: int = 0
    runs: int = 0
    """Stretches of equal weight."""
    tokens: int = 0
    trained_tokens: int = 0
    """Tokens that get a log-prob; see `core.packing.scored_tokens`."""
    min_id: int = 0
    max_id: int = 0
    longest_chain: int = 0
    """Most tokens of a segment with all those that it continues."""


@dataclass(frozen=True)
class _Column:
    """One file: `per` (a field of `Summary`) says how many items it holds, `width` how many numbers an item."""

    dtype: str
    per: str
    width: int = 1
    content: bool = True
    """Whether it is part of what the rows are; the others follow from it, or say where the rows are from."""


COLUMNS = {
    "ids": _Column("<i4", "tokens"),
    "run_ends": _Column("<i4", "runs"),  # in tokens of the row
    "run_weights": _Column("<f4", "runs"),
    "segment_ends": _Column("<i4", "segments"),  # in tokens of the row
    "parents": _Column("<i4", "segments"),
    "row_ends": _Column("<i8", "rows", 3),  # in tokens, runs and segments of the store
    "weight_sums": _Column("<f8", "rows", content=False),
    "scored": _Column("<i4", "rows", content=False),
    "numbers": _Column("<i8", "rows", content=False),
}
"""The files of a store by name, each with the suffix `.bin`."""


def expected_sizes(summary: Summary) -> dict[str, int]:
    """Bytes of each file of a store."""
    return {
        f"{name}.bin": getattr(summary, column.per) * column.width * np.dtype(column.dtype).itemsize
        for name, column in COLUMNS.items()
    }


class Writer:
    """Appends rows to the files of a store.

    Nothing that is appended counts until its `summary` is kept elsewhere: a writer that is opened with an earlier
    summary cuts off whatever came after it, such as half a chunk of a killed process.
    """

    def __init__(self, folder: Path, summary: Summary | None = None) -> None:
        """Open the files, or create them.

        Args:
            folder: exists.
            summary: what is written already and to be kept; nothing if left out.

        Raises:
            OSError: a file is shorter than the summary says, or cannot be written.
        """
        self.summary = summary or Summary()
        self._files: dict[str, FileIO] = {}
        for name, size in expected_sizes(self.summary).items():
            # Unbuffered: what a full disk has refused must not be tried again when the file is closed.
            file = (folder / name).open("r+b" if (folder / name).exists() else "w+b", buffering=0)
            self._files[name] = file
            if file.seek(0, 2) < size:
                raise OSError(None, f"{folder / name} is cut short")
            file.truncate(size)
            file.seek(size)

    def append(self, rows: Sequence[Sequence[Part]], numbers: Sequence[int]) -> None:
        """Write rows.

        Args:
            rows: the segments of each, parents before children, none empty.
            numbers: where each row came from, as its source counts.

        Raises:
            OSError: the disk's.
        """
        if not rows:
            return
        columns, added = _columns(rows, numbers, self.summary)
        for name, values in columns.items():
            left = memoryview(np.ascontiguousarray(values, dtype=COLUMNS[name].dtype).tobytes())
            while left:
                left = left[self._files[f"{name}.bin"].write(left) :]
        self.summary = added

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _columns(
    rows: Sequence[Sequence[Part]], numbers: Sequence[int], before: Summary
) -> tuple[dict[str, Array], Summary]:
    parts = [part for row in rows for part in row]
    sizes = np.fromiter((len(part.ids) for part in parts), np.int64, len(parts))
    tokens = int(sizes.sum())
    ids = np.fromiter(chain.from_iterable(part.ids for part in parts), np.int64, tokens)
    weights = np.fromiter(chain.from_iterable(part.weights for part in parts), np.float32, tokens)
    parents = np.fromiter((part.parent for part in parts), np.int64, len(parts))

    part_ends = np.cumsum(sizes)
    row_parts = np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)))  # segments up to the end of each row
    row_ends = part_ends[row_parts - 1]
    row_starts = np.concatenate(([0], row_ends[:-1]))
    row_of_part = np.repeat(np.arange(len(rows)), np.diff(row_parts, prepend=0))

    new_run = np.ones(tokens, bool)
    new_run[1:] = weights[1:] != weights[:-1]
    new_run[row_starts] = True
    run_starts = np.flatnonzero(new_run)
    run_ends = np.append(run_starts[1:], tokens)
    runs_before = np.searchsorted(run_starts, row_ends)  # runs up to the end of each row

    scored = weights.copy()
    scored[(part_ends - sizes)[parents < 0]] = 0.0  # a document's first token has no predecessor
    counts = np.add.reduceat((scored > 0).astype(np.int64), row_starts)
    columns = {
        "ids": ids,
        "run_ends": run_ends - row_starts[np.searchsorted(row_ends, run_starts, side="right")],
        "run_weights": weights[run_starts],
        "segment_ends": part_ends - row_starts[row_of_part],
        "parents": parents,
        "row_ends": np.stack(
            [before.tokens + row_ends, before.runs + runs_before, before.segments + row_parts], axis=1
        ),
        "weight_sums": np.add.reduceat(scored.astype(np.float64), row_starts),
        "scored": counts,
        "numbers": np.asarray(numbers),
    }
    summary = Summary(
        rows=before.rows + len(rows),
        segments=before.segments + len(parts),
        runs=before.runs + len(run_starts),
        tokens=before.tokens + tokens,
        trained_tokens=before.trained_tokens + int(counts.sum()),
        min_id=min(int(ids.min()), before.min_id) if before.rows else int(ids.min()),
        max_id=max(int(ids.max()), before.max_id),
        longest_chain=max(before.longest_chain, _longest_chain(rows, sizes, parents)),
    )
    return columns, summary


def _longest_chain(rows: Sequence[Sequence[Part]], sizes: Array, parents: Array) -> int:
    if (parents < 0).all():
        return int(sizes.max())
    longest = 0
    for row in rows:
        ends: list[int] = []
        for part in row:
            ends.append(len(part.ids) + (ends[part.parent] if part.parent >= 0 else 0))
        longest = max(longest, *ends)
    return longest


class Store(Sequence[Document]):
    """The documents of a folder that a `Writer` filled."""

    def __init__(self, folder: Path, summary: Summary) -> None:
        """Map nothing yet; sizes are checked by whoever kept the summary (`expected_sizes`)."""
        self.folder, self.summary = folder, summary

    def __len__(self) -> int:
        return self.summary.rows

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...
    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        """One document, its tensors freshly made (int64 ids, float32 weights)."""
        if isinstance(index, slice):
            return [self[row] for row in range(len(self))[index]]
        row = range(len(self))[index]
        arrays = self.arrays
        ends = arrays["row_ends"]
        (token, run, segment), (token_end, run_end, segment_end) = (ends[row - 1] if row else (0, 0, 0)), ends[row]
        ids_L = torch.from_numpy(arrays["ids"][token:token_end].astype(np.int64))
        runs = np.diff(arrays["run_ends"][run:run_end], prepend=0)
        weights_L = torch.from_numpy(np.repeat(arrays["run_weights"][run:run_end], runs))
        if segment_end - segment == 1:
            return Document((Segment(ids_L, weights_L),))
        bounds = [0, *arrays["segment_ends"][segment:segment_end].tolist()]
        parents = arrays["parents"][segment:segment_end].tolist()
        return Document(
            tuple(
                Segment(ids_L[start:end], weights_L[start:end], parent)
                for start, end, parent in zip(bounds, bounds[1:], parents, strict=False)
            )
        )

    @cached_property
    def arrays(self) -> dict[str, Array]:
        """The files, mapped, by the names in `COLUMNS`."""
        return {name: _mapped(self.folder / f"{name}.bin", column) for name, column in COLUMNS.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "summary": self.summary}  # a worker process maps the files itself

    @property
    def lengths(self) -> Array:
        """Tokens of each document, every segment once; int64."""
        return np.diff(self.arrays["row_ends"][:, 0], prepend=0)

    @property
    def weight_sums(self) -> Array:
        """Sum of the weights of each document's scored tokens; float64."""
        return self.arrays["weight_sums"]

    @property
    def scored(self) -> Array:
        """Number of scored tokens of each document; int32."""
        return self.arrays["scored"]

    @property
    def numbers(self) -> Array:
        """The row of its source that each document came from; int64."""
        return self.arrays["numbers"]

    def content_digest(self) -> str:
        """Hash of the documents: ids, weights, segments, in order. Reads all of the files. Hexadecimal."""
        digest = hashlib.sha256()
        for name, column in COLUMNS.items():
            if column.content:
                path = self.folder / f"{name}.bin"
                digest.update(f"{name} {column.dtype} {path.stat().st_size}\n".encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def _mapped(path: Path, column: _Column) -> Array:
    if not path.stat().st_size:  # nothing can be mapped of an empty file
        values: Array = np.empty(0, column.dtype)
    else:
        values = np.memmap(path, dtype=column.dtype, mode="r").view(np.ndarray)
    return values.reshape(-1, column.width) if column.width > 1 else values
