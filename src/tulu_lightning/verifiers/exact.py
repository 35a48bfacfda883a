"""Text equality: the response, without surrounding white space, is the target."""

from dataclasses import dataclass
from typing import ClassVar

from tulu_lightning.types import Verdict

__all__ = ["Exact"]


@dataclass(frozen=True)
class Exact:
    """Right when response and target are the same text but for white space around them; a blank response is unparseable."""

    runs: ClassVar = "here"

    def __call__(self, response: str, target: str) -> Verdict:
        """Score 1 or 0."""
        text = response.strip()
        if not text:
            return Verdict("unparseable", 0.0)
        return Verdict("right", 1.0) if text == target.strip() else Verdict("wrong", 0.0)

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None."""
        return None if target.strip() else f"{target!r} is blank: no response can be right"
