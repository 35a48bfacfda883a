"""A short answer that is right when one of the accepted names is in it: PopQA's score."""

import json
from dataclasses import dataclass
from typing import ClassVar

from tulu_lightning.types import Verdict

__all__ = ["ContainsAny"]


@dataclass(frozen=True)
class ContainsAny:
    """Right when the response contains an alias as it is, in small letters, or capitalised (Mallen et al. 2023).

    The target is a JSON list of aliases.

    Example: "He is a Politician" with the target `["politician"]` is right, "POLITICIAN" is wrong.
    """

    runs: ClassVar = "here"

    def __call__(self, response: str, target: str) -> Verdict:
        """Score 1 or 0."""
        forms = (form for alias in json.loads(target) for form in (alias, alias.lower(), alias.capitalize()))
        right = any(form in response for form in forms)
        return Verdict("right" if right else "wrong", float(right))

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None."""
        try:
            aliases = json.loads(target)
        except ValueError:
            aliases = None
        sound = isinstance(aliases, list) and aliases and all(isinstance(a, str) and a.strip() for a in aliases)
        return None if sound else f"{target!r} is not a list of names"
