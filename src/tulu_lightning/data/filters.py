"""Rows that a source leaves out on request. (Stand-in: by a word in any message.)"""

from collections.abc import Sequence

from tulu_lightning.data.chat import Message
from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.sources import Row, Source

__all__ = ["check"]


def check(source: Source, messages: Sequence[Message], row: Row) -> None:
    """Raise LeftOut for a row that one of the filters rejects."""
    if any(not message["content"].strip() for message in messages):
        raise LeftOut("with an empty message")
    for word in source.filters:
        if any(word in message["content"] for message in messages):
            raise LeftOut(f"with {word!r}")
