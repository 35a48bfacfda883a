"""A regular expression somewhere in the response."""

import re
from dataclasses import dataclass
from typing import ClassVar

from tulu_lightning.types import Verdict

__all__ = ["Regex"]


@dataclass(frozen=True)
class Regex:
    r"""Right when the pattern (Python's `re`, the target) is found anywhere in the response; a blank response is unparseable.

    For the whole response write `\A...\Z`; for any case, `(?i)` at the start; for a dot that matches line ends, `(?s)`.
    """

    runs: ClassVar = "pool"  # a pattern with nested repeats takes exponential time

    def __call__(self, response: str, target: str) -> Verdict:
        """Score 1 or 0.

        Raises:
            ValueError: the target is no pattern; `complaint` says so beforehand.
        """
        if complaint := self.complaint(target):
            raise ValueError(complaint)
        if not response.strip():
            return Verdict("unparseable", 0.0)
        return Verdict("right", 1.0) if re.search(target, response) else Verdict("wrong", 0.0)

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None."""
        if not target:
            return "an empty pattern is found everywhere"
        try:
            re.compile(target)
        except (re.error, RecursionError, OverflowError) as error:
            return f"{target!r} is not a regular expression: {error}"
        return None
