"""The texts that decontamination compares: the turns of training rows, the fields of test items."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from tulu_lightning.data.decontaminate_settings import Evaluation
from tulu_lightning.data.formats import own_row, to_messages
from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.pair_formats import Pair, to_pair
from tulu_lightning.data.prompt_formats import READERS as PROMPT_READERS
from tulu_lightning.data.readers import field, messages_of, shown
from tulu_lightning.data.sources import Row, Source, Table
from tulu_lightning.errors import InputError

__all__ = ["items_of", "pieces_of", "turns_of"]

CHUNK = 1024
"""Items that are read at once."""
CHARACTERS = 2 << 20
"""Of rows that are looked up at once."""


def turns_of(source: Source, number: int, row: Row, which: str = "user") -> list[str]:
    """The turns of a training row: of a pair those of its chosen side, of plain text all of it.

    Args:
        source: where it is from; its `read` says how it is written.
        number: of the row, from 1.
        row: its fields.
        which: `user` or `all`.

    Raises:
        InputError: the row is malformed, or a pair in token ids alone.
    """
    where = source.row_name(number)
    try:
        messages: Sequence[Any] = _messages(source, where, number, row)
    except LeftOut:
        return []
    read = ("user", "text") if which == "user" else ("user", "text", "assistant", "system")
    return [message["content"] for message in messages if message["role"] in read]


def _messages(source: Source, where: str, number: int, row: Row) -> Sequence[Any]:
    if "." in source.read:
        row = dict(own_row(where, source.read, row, "messages, or chosen and rejected"))
    elif source.read in PROMPT_READERS:
        row = PROMPT_READERS[source.read](where, row)
    if source.read == "ultrafeedback" or ("chosen" in row and "messages" not in row):
        made = dataclasses.replace(source, read="messages") if "." in source.read else source
        pair = to_pair(made, number, row)
        if not isinstance(pair, Pair):
            raise InputError(where, "the pair is in token ids", "Decontaminate the rows that it was made of.")
        return pair.chosen
    if source.read in ("sharegpt", "alpaca", "prompt_completion", "text"):
        return to_messages(source, number, row)
    return messages_of(where, "messages", field(where, row, "messages"))


def pieces_of(rows: Sequence[Sequence[str]]) -> Iterator[tuple[int, Sequence[Sequence[str]]]]:
    """Rows of about `CHARACTERS` at a time, each piece with the place of its first."""
    start = size = 0
    for place, row in enumerate(rows):
        size += sum(map(len, row))
        if size > CHARACTERS:
            yield start, rows[start : place + 1]
            start, size = place + 1, 0
    if start < len(rows):
        yield start, rows[start:]


def items_of(evaluation: Evaluation, table: Table) -> list[list[str]]:
    """The fields of each test item.

    Raises:
        InputError: an item lacks a field, or has something else than text in it.
    """
    source, items = evaluation.source(), []
    for start in range(0, len(table), CHUNK):
        indices = range(start, min(start + CHUNK, len(table)))
        for index, row in zip(indices, table.take(indices), strict=True):
            number = table.number(index)
            if evaluation.fields:
                where = source.row_name(number)
                texts = [_text(where, name, _inside(where, row, name)) for name in evaluation.fields]
                items.append([text for text in texts if text.strip()] or texts[:1])  # an empty one can match nothing
            else:
                items.append(["\n".join(turns_of(source, number, row))])
    return items


def _inside(where: str, row: Row, name: str) -> Any:
    found: Any = row
    for part in name.split("."):
        if not isinstance(found, dict):
            raise InputError(
                where, f"{name} leads to {shown(found)}, not an object", "Correct the evaluation's fields."
            )
        found = field(where, found, part)
    return found


def _text(where: str, name: str, value: Any) -> str:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise InputError(where, f"{name} is {shown(value)}, not text", "Name fields that hold text.")
    return value
