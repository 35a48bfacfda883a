"""Rows of any format to messages. (Stand-in: chat rows only.)"""

from tulu_lightning.data.chat import Message
from tulu_lightning.data.readers import read_chat
from tulu_lightning.data.sources import Row, Source

__all__ = ["to_messages"]


def to_messages(source: Source, number: int, row: Row) -> list[Message]:
    """The checked messages of an SFT row."""
    extra = [{key: given[key] for key in ("weight", "train") if key in given} for given in row.get("messages", [])]
    return [{**message, **more} for message, more in zip(read_chat(source, number, row), extra, strict=True)]
