"""One line that refuses a setting out of its range, and one that refuses those which a choice leaves unread."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from tulu_lightning.errors import InputError, nearest

__all__ = ["require", "require_kind"]


def require(holds: bool, key: str, value: object, remedy: str) -> None:
    """Refuse a setting unless its condition holds.

    Write conditions so that they are false for nan: `0 < x`, not `not x <= 0`.

    Raises:
        InputError: names the key, the value received and what would do.
    """
    if not holds:
        raise InputError(key, f"is {value}", remedy)


def require_kind(settings: Any, where: str, reads: Mapping[str, Sequence[str]]) -> None:
    """Refuse an unknown `kind`, and settings that the chosen kind does not read.

    Args:
        settings: a dataclass with a field `kind`, whose other fields all have defaults.
        where: its key in a config.
        reads: for each kind, the names of the fields that it reads.

    Raises:
        InputError: names the key and the default to go back to.
    """
    kind = settings.kind
    require(kind in reads, f"{where}.kind", repr(kind), nearest(str(kind), reads))
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name != "kind" and field.name not in reads[kind] and value != field.default:
            readers = " or ".join(name for name, names in reads.items() if field.name in names)
            what = f"is {value}, and {where}.kind {kind} does not read it"
            raise InputError(f"{where}.{field.name}", what, f"Leave it at {field.default}, or use kind {readers}.")
