"""Which SFT rows a source leaves out although they are well formed."""

from collections.abc import Sequence

from tulu_lightning.data.chat import Message
from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.sources import Row, Source
from tulu_lightning.errors import InputError

__all__ = ["check"]


def check(source: Source, number: int, messages: Sequence[Message], row: Row) -> None:
    """Let a row pass, or say why not.

    Args:
        source: whose `keep_empty` and `filters` apply.
        number: the row's number there, from 1.
        messages: the row as it is trained on.
        row: the row as it was read.

    Raises:
        InputError: a filter of the user's fails.
        LeftOut: a message is empty (Tülu 3, section 4.1.1), or one of the filters complains.
    """
    if not source.keep_empty and any(not message["content"].strip() for message in messages):
        raise LeftOut("with an empty message")
    for criterion in source.filters:
        try:
            reason = criterion.complaint(messages, row)
        except InputError:
            raise
        except Exception as error:
            name = getattr(criterion, "function", type(criterion).__name__)
            what = f"the filter {name} fails on it ({type(error).__name__}: {error})"
            raise InputError(source.row_name(number), what, "Correct the filter.") from error
        if reason:
            raise LeftOut(reason)
