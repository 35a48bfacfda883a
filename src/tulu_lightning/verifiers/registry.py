"""Verifiers by name. To add one: write its file in this folder, and one line here."""

from typing import Protocol

from tulu_lightning.errors import InputError, nearest
from tulu_lightning.types import Verdict
from tulu_lightning.verifiers.exact import Exact
from tulu_lightning.verifiers.last_number import LastNumber

__all__ = ["VERIFIERS", "Verifier", "check_target", "get"]


class Verifier(Protocol):
    """Judges a response by its text alone: pure, picklable, in time linear in the text."""

    def __call__(self, response: str, target: str) -> Verdict:
        """The verdict on a response, whatever it holds; a bad target may raise ValueError."""
        ...

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None; asked when data are read."""
        ...


VERIFIERS: dict[str, Verifier] = {"exact": Exact(), "last_number": LastNumber()}


def get(name: str) -> Verifier:
    """The verifier of that name.

    Raises:
        InputError: no verifier has that name; offers the nearest one.
    """
    if name not in VERIFIERS:
        raise InputError("verifier", f"there is no verifier {name!r}", nearest(name, VERIFIERS))
    return VERIFIERS[name]


def check_target(name: str, target: str) -> str | None:
    """Why the named verifier cannot use the target (e.g. "'sixty' is not a number"), or None if it can."""
    return get(name).complaint(target)
