"""One line that refuses a setting out of its range."""

from tulu_lightning.errors import InputError

__all__ = ["require"]


def require(holds: bool, key: str, value: object, remedy: str) -> None:
    """Refuse a setting unless its condition holds.

    Write conditions so that they are false for nan: `0 < x`, not `not x <= 0`.

    Raises:
        InputError: names the key, the value received and what would do.
    """
    if not holds:
        raise InputError(key, f"is {value}", remedy)
