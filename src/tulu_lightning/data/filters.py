"""Which SFT rows a source leaves out although they are well formed."""

from collections.abc import Sequence

from tulu_lightning.data.chat import Message
from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.sources import Row, Source

__all__ = ["check"]


def check(source: Source, messages: Sequence[Message], row: Row) -> None:
    """Let a row pass, or say why not.

    Args:
        source: whose `keep_empty` and `filters` apply.
        messages: the row as it is trained on.
        row: the row as it was read.

    Raises:
        LeftOut: a message is empty (Tülu 3, section 4.1.1), or one of the filters complains.
    """
    if not source.keep_empty and any(not message["content"].strip() for message in messages):
        raise LeftOut("with an empty message")
    for criterion in source.filters:
        if reason := criterion.complaint(messages, row):
            raise LeftOut(reason)
