"""Rows as Parquet and back, without a change to any: what `tulu generate`, `judge` and `pairs` write when asked to.

Files that are written together get the same columns, so that any reader takes them as one set. A field whose values have
one Arrow type in all rows is a column of that type. One that has not (a rating is a number or "N/A") is a column of JSON
text, named in the file's metadata. A field that is None counts as one that the row does not have.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tulu_lightning.errors import InputError
from tulu_lightning.files import put_in_place

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Columns", "columns_of", "rows_of_parquet", "write_parquet"]

AS_JSON = b"tulu.json"
"""Of a file's metadata: which columns are JSON text."""
ROWS = 1000
"""Rows in memory at a time when a file is read."""
Columns = dict[str, "pa.DataType | None"]
"""Type of each column, in order; None is JSON text."""


def columns_of(parts: Iterable[Sequence[Mapping[str, Any]]]) -> Columns:
    """The columns that hold all of these rows.

    Args:
        parts: rows, in pieces that fit into memory.
    """
    import pyarrow as pa

    known: Columns = {}
    for rows in parts:
        for name in dict.fromkeys(name for row in rows for name in row):
            kind = _type([row[name] for row in rows if row.get(name) is not None])
            if name not in known:
                known[name] = kind
            elif (before := known[name]) is not None:
                known[name] = None if kind is None else _common(before, kind)
    null = pa.null()
    return {name: pa.string() if kind == null else kind for name, kind in known.items()}


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], columns: Columns) -> None:
    """Write a file of rows, whole or not at all; it is read back before it gets its name.

    Args:
        path: what it is to be called.
        rows: its rows.
        columns: from `columns_of`, over these rows and those of its neighbours.

    Raises:
        OSError: the disk does not take it, or does not give back what was written.
    """
    import pyarrow as pa
    from pyarrow import parquet

    as_json = [name for name, kind in columns.items() if kind is None]
    fields = [pa.field(name, pa.string() if kind is None else kind) for name, kind in columns.items()]
    schema = pa.schema(fields, {AS_JSON: json.dumps(as_json).encode()})
    arrays = [pa.array(_values(rows, name, columns[name]), schema.field(name).type) for name in columns]
    beside = path.with_name(f".{path.name}.tmp")
    parquet.write_table(pa.Table.from_arrays(arrays, schema=schema), beside, compression="zstd", row_group_size=ROWS)
    for row, back in zip(rows, rows_of_parquet(beside), strict=True):
        if _text(_there(row)) != _text(back):
            raise OSError(f"{beside} does not hold what was written")
    put_in_place(beside, path)


def rows_of_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, as they were before they were written.

    Raises:
        InputError: it is no whole Parquet file.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            as_json = json.loads((file.schema_arrow.metadata or {}).get(AS_JSON, b"[]"))
            for batch in file.iter_batches(ROWS):
                for row in batch.to_pylist():
                    yield {
                        name: json.loads(value) if name in as_json else value
                        for name, value in row.items()
                        if value is not None
                    }
    except pa.ArrowInvalid as error:
        raise InputError(str(path), f"it is no whole Parquet file ({error})", "Remove it, or write it again.") from None


def _type(values: Sequence[Any]) -> "pa.DataType | None":
    """The Arrow type that gives these values back as they are; None if there is none."""
    import pyarrow as pa

    try:
        array = pa.array(values)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):  # mixed types, lone surrogates, large numbers
        return None
    kind = array.type
    if not _plain(kind) or _text(array.to_pylist()) != _text(list(values)):
        return None
    return kind


def _plain(kind: "pa.DataType") -> bool:
    """Whether Parquet and every reader of it have the type: an object without fields has none."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.num_fields > 0 and all(_plain(kind.field(place).type) for place in range(kind.num_fields))
    return _plain(kind.value_type) if pa.types.is_list(kind) else True


def _common(one: "pa.DataType", other: "pa.DataType") -> "pa.DataType | None":
    """The type of both, where one of them may have seen nothing but missing values or empty lists."""
    import pyarrow as pa

    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_list(one) and pa.types.is_list(other):
        inside = _common(one.value_type, other.value_type)
        return None if inside is None else pa.list_(inside)
    return None


def _values(rows: Sequence[Mapping[str, Any]], name: str, kind: "pa.DataType | None") -> list[Any]:
    values = [row.get(name) for row in rows]
    return values if kind is not None else [None if value is None else _text(value) for value in values]


def _there(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def _text(value: Any) -> str:
    """As JSON, in which 4 and 4.0 differ, and lone surrogates are ASCII."""
    return json.dumps(value, sort_keys=True)
