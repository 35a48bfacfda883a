"""Where rows come from: a local JSON-lines file, or a function that makes them."""

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tulu_lightning.errors import InputError

__all__ = ["Row", "Source", "Table", "load", "open_source"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One source of a mixture.

    Example: `Source("sums", rows="tulu_lightning.assets.arithmetic.sft_rows", args={"count": 200})`.
    """

    name: str
    """How tables and messages call it; unique within a mixture."""
    path: str | None = None
    """A JSON-lines file, one object a line."""
    rows: str | None = None
    """Import path of a function that returns a list of rows."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of that function."""
    limit: int | None = None
    """Take only the first so many rows."""
    read: str = "messages"
    fraction: float | None = None
    count: int | None = None
    cap: int | None = None
    upsample: float = 1.0
    filters: list[str] = field(default_factory=list)

    def row_name(self, number: int) -> str:
        """How an error names a row (from 1)."""
        return f"{self.path or f'source {self.name!r}'}, row {number}"


class Table:
    """The rows of one opened source. (Stand-in: in memory.)"""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def number(self, index: int) -> int:
        """The number, from 1, that a row has in its file."""
        return index + 1

    def take(self, indices: Sequence[int]) -> list[Row]:
        """Rows by index, from 0."""
        return [self._rows[index] for index in indices]

    @property
    def fingerprint(self) -> str:
        """Hash of the rows, wherever they lie. Hexadecimal."""
        return hashlib.sha256(json.dumps(self._rows).encode()).hexdigest()


def open_source(source: Source) -> Table:
    """A source's rows, checked as `load` does. (Stand-in.)"""
    return Table(load(source))


def load(source: Source) -> list[Row]:
    """All rows of a source, each a dictionary; their fields are checked by the readers.

    Raises:
        InputError: neither or both of `path` and `rows`; a file that is missing, unreadable, empty, or not one JSON
            object a line; a function that cannot be found or called with `args`, or returns something else.
    """
    where = f"source {source.name!r}"
    if (source.path is None) == (source.rows is None):
        found = "neither path nor rows is given" if source.path is None else "both path and rows are given"
        raise InputError(where, found, "Give exactly one of them.")
    if source.limit is not None and source.limit < 1:
        raise InputError(where, f"limit is {source.limit}", "Use at least 1, or leave it out.")
    if source.path is not None:
        if source.args:
            raise InputError(where, "args do nothing for a file", "Leave args out, or use rows instead of path.")
        rows = list(_read_lines(source, Path(source.path).expanduser()))
    else:
        rows = _call(where, str(source.rows), source.args)
    if not rows:
        raise InputError(source.path or where, "it is empty", "Give at least one row, or leave the source out.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            remedy = "Make every row an object with named fields."
            raise InputError(source.row_name(number), f"the row is a {type(row).__name__}, not an object", remedy)
    return rows[: source.limit]


def _read_lines(source: Source, path: Path) -> Iterator[Any]:
    try:
        # Only \n ends a JSON line; str.splitlines would also cut at U+2028, which JSON strings may hold.
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except FileNotFoundError:
        raise InputError(str(path), "there is no such file", "Correct the source's path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), f"the file cannot be read ({error})", "Give a readable UTF-8 file.") from error
    if lines == [""]:
        return
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            found = (
                f"the line is not JSON ({error.msg} at column {error.colno})" if line.strip() else "the line is empty"
            )
            raise InputError(source.row_name(number), found, "Write one JSON object a line.") from None


def _call(where: str, import_path: str, args: dict[str, Any]) -> list[Any]:
    function = _find(where, import_path)
    try:
        signature = inspect.signature(function)
    except ValueError:
        raise InputError(
            where, f"{import_path} is built in and names no parameters", "Wrap it in a function."
        ) from None
    try:
        signature.bind(**args)
    except TypeError as error:
        remedy = f"It takes {signature}."
        raise InputError(where, f"{import_path} cannot be called with these args ({error})", remedy) from None
    rows = function(**args)
    if not isinstance(rows, list):
        raise InputError(where, f"{import_path} returned a {type(rows).__name__}", "It must return a list of rows.")
    return rows


def _find(where: str, import_path: str) -> Callable[..., Any]:
    module_name, _, name = import_path.rpartition(".")
    remedy = "Give the import path of a function, such as tulu_lightning.assets.arithmetic.sft_rows."
    try:
        function = getattr(importlib.import_module(module_name), name, None)
    except (ImportError, ValueError) as error:
        raise InputError(where, f"{import_path} cannot be imported ({error})", remedy) from error
    if not callable(function):
        raise InputError(where, f"{import_path} is not a function", remedy)
    return function
