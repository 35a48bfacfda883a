"""Whether what `datasets` read of a JSON-lines file is what the file says."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute

from tulu_lightning.data.jsonl import stream_lines

__all__ = ["faithful"]


def faithful(data: datasets.Dataset, path: Path) -> bool:
    """Whether the rows are those of the file; their number is not looked at.

    Args:
        data: what was read.
        path: the file, plain or packed.
    """
    table = data.data.table
    if not table.column_names or not all(map(_as_in_json, table.schema.types)):
        return False
    try:
        table.validate(full=True)  # text that is not UTF-8 would come out changed
    except pa.ArrowInvalid:
        return False
    if all(column.null_count for column in table.columns) and (
        np.logical_and.reduce([column.is_null().to_numpy() for column in table.columns]).any()
    ):
        return False
    return not _integers_among_floats(table, path)


def _as_in_json(kind: pa.DataType) -> bool:
    """Whether values of an Arrow type are what JSON had there, integers among floats aside.

    Dates are guesses. Files with a field of mixed types went through another JSON library, which drops lone surrogates.
    """
    if pa.types.is_struct(kind):
        return all(_as_in_json(kind.field(index).type) for index in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _as_in_json(kind.value_type)
    return str(kind) in ("string", "large_string", "bool", "int64", "double", "null")


def _integers_among_floats(table: pa.Table, path: Path) -> bool:
    """Whether an integer of the file became a float: 3 beside 2.5 would be 3.0, and a reader's text another one.

    Where a float is a whole number, only the file says how it was written; it is read through then, and nothing kept.
    """
    compute: Any = pyarrow.compute  # its functions are made when it is imported
    suspect = {
        name: column.type
        for name, column in zip(table.column_names, table.columns, strict=True)
        if any(
            compute.any(compute.equal(leaf, compute.floor(leaf))).as_py()
            for chunk in column.chunks
            for leaf in _floats(chunk)
        )
    }
    if not suspect:
        return False
    rows = map(json.loads, stream_lines(path))
    return any(_has_integer(row.get(name), kind) for row in rows for name, kind in suspect.items())


def _floats(array: Any) -> Iterator[Any]:
    """The floats at any depth of an array."""
    if pa.types.is_struct(array.type):
        for part in array.flatten():
            yield from _floats(part)
    elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        yield from _floats(array.flatten())
    elif pa.types.is_float64(array.type):
        yield array


def _has_integer(value: Any, kind: Any) -> bool:
    """Whether a value of the file has an integer where its Arrow type has a float."""
    if value is None:
        return False
    if pa.types.is_struct(kind):
        return any(_has_integer(value.get(field.name), field.type) for field in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return any(_has_integer(item, kind.value_type) for item in value)
    return pa.types.is_float64(kind) and isinstance(value, int)
