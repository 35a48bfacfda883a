"""The rows of one opened source, to be taken by index."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ArrowRows", "ListRows", "Row", "Rows", "Table", "plain"]

Row = dict[str, Any]


class Rows(Protocol):
    """Rows as a file or a function gives them."""

    def __len__(self) -> int: ...

    def columns(self) -> Sequence[str]:
        """Names of all fields that any row has."""
        ...

    def take(self, indices: Sequence[int]) -> list[Row]:
        """The rows of these indices, from 0, without the fields that are None."""
        ...

    def codes(self, column: str) -> tuple[list[Any], np.ndarray]:
        """The different values of a field, and for every row the index of its own among them (-1 for none)."""
        ...


class ListRows:
    """Rows in memory."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def columns(self) -> Sequence[str]:
        """As in `Rows`."""
        return list(dict.fromkeys(name for row in self._rows for name in row))

    def take(self, indices: Sequence[int]) -> list[Row]:
        """As in `Rows`."""
        return [_without_none(self._rows[index]) for index in indices]

    def codes(self, column: str) -> tuple[list[Any], np.ndarray]:
        """As in `Rows`."""
        values, found = [row.get(column) for row in self._rows], {}
        codes = [-1 if value is None else found.setdefault(plain(value), len(found)) for value in values]
        return list(found), np.array(codes, dtype=np.int64)

    def digest(self) -> str:
        """SHA-256 of the rows as JSON with sorted keys. Hexadecimal."""
        digest = hashlib.sha256()
        for row in self._rows:
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
            digest.update(b"\n")
        return digest.hexdigest()


class ArrowRows:
    """Rows of a `datasets` data set; memory-mapped unless it is small."""

    def __init__(self, data: "Dataset") -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def columns(self) -> Sequence[str]:
        """As in `Rows`."""
        return self._data.column_names

    def take(self, indices: Sequence[int]) -> list[Row]:
        """As in `Rows`. Arrow fills a field that a row does not have with None; those are left out again."""
        if isinstance(indices, range) and indices.step == 1:
            batch = self._data[indices.start : indices.stop]
        else:
            batch = self._data[[int(index) for index in indices]]
        names = list(batch)
        return [_without_none(dict(zip(names, row, strict=True))) for row in zip(*batch.values(), strict=True)]

    def codes(self, column: str) -> tuple[list[Any], np.ndarray]:
        """As in `Rows`."""
        field = self._data.select_columns([column]).with_format("arrow")[:][column]
        try:
            coded = field.dictionary_encode().unify_dictionaries().combine_chunks()
        except NotImplementedError:  # Arrow's for lists and structs is one of these
            return ListRows(self._data.select_columns([column]).to_list()).codes(column)
        if hasattr(coded, "chunks"):  # no row at all
            return [], np.zeros(0, dtype=np.int64)
        return coded.dictionary.to_pylist(), coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


class Table:
    """The rows that a source gives: those of its file or function, matched, limited and with its columns renamed."""

    fingerprint: str
    """Hash of the content and of what selects and renames here; neither path nor time is in it. Hexadecimal."""
    repeating: int = 0
    """Rows that decontamination has taken out."""

    def __init__(
        self,
        rows: Rows,
        digest: str,
        picked: Sequence[int] | None = None,
        columns: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap rows.

        Args:
            rows: all of them.
            digest: hash of their content.
            picked: indices of those that are given, in order; None gives all.
            columns: names of fields by the names under which the rows have them.
            settings: what led to `picked` and `columns`, for the fingerprint.
        """
        self._rows, self._columns = rows, dict(columns or {})
        self._picked = range(len(rows)) if picked is None else picked
        said = json.dumps(settings, sort_keys=True) if settings else ""
        self.fingerprint = hashlib.sha256(f"{digest}{said}".encode()).hexdigest() if said else digest

    def __len__(self) -> int:
        return len(self._picked)

    def number(self, index: int) -> int:
        """The number, from 1, that a row has in its file."""
        return int(self._picked[index]) + 1

    def without(self, indices: Sequence[int] | np.ndarray, why: str) -> "Table":
        """The same table without the rows of these indices, which repeat what is evaluated.

        Args:
            indices: of the rows.
            why: what found them; becomes part of the fingerprint.
        """
        kept = np.delete(np.asarray(self._picked, dtype=np.int64), np.asarray(indices, dtype=np.int64))
        fingerprint = hashlib.sha256(f"{self.fingerprint}{why}".encode()).hexdigest()
        table = Table(self._rows, fingerprint, kept, self._columns)  # type: ignore[arg-type]  an array is a sequence
        table.repeating = self.repeating + len(self) - len(kept)
        return table

    def take(self, indices: Sequence[int]) -> list[Row]:
        """The rows of these indices, from 0, as plain dictionaries; a field that is None is left out of its row.

        Fields inside a row (of its messages, say) that are None are left out too.
        """
        if isinstance(indices, range) and isinstance(self._picked, range):
            inside = self._picked[indices.start : indices.stop : indices.step]
        else:
            inside = [self._picked[index] for index in indices]
        rows = self._rows.take(inside)
        return [self._renamed(row) for row in rows] if self._columns else rows

    def _renamed(self, row: Row) -> Row:
        found = {ours: row[theirs] for ours, theirs in self._columns.items() if theirs in row}
        kept = {name: value for name, value in row.items() if name not in self._columns}
        return {**kept, **found}


def plain(value: Any) -> str:
    """A field's value as `match` compares it: text; numbers and truth values as YAML writes them."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
