"""What a row must satisfy to be kept: the filters that a source may list.

Each is a small frozen dataclass with `complaint`, which gives the reason for leaving a row out, or None. In a config
the keys say which one is meant: `{words: [OpenAI]}` is `Keywords`, `{function: my_package.is_english}` is `Predicate`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tulu_lightning.data.importing import find_function
from tulu_lightning.errors import InputError, nearest

__all__ = ["Criterion", "Keywords", "Predicate"]

ROLES = ("system", "user", "assistant", "text")
"""Roles of messages, and that of a row of plain text."""


@dataclass(frozen=True)
class Keywords:
    """Leave out rows in which any of some words occurs.

    Tülu 3 (section 4.1.1) drops answers that name a model or its maker.
    """

    words: list[str]
    """Words or phrases, in any case; `GPT` is found in "GPT-4" but not in "ChatGPT"."""
    roles: list[str] = field(default_factory=lambda: ["assistant", "text"])
    """Whose messages are searched: assistant, user, system; `text` is a row of plain text."""

    def __post_init__(self) -> None:
        if not self.words or not all(isinstance(word, str) and word.strip() for word in self.words):
            raise InputError("filters.words", f"is {self.words}", "Give at least one word, and no empty one.")
        if not self.roles:
            raise InputError("filters.roles", "is empty, so no message would be searched", "Name at least one role.")
        for role in self.roles:
            if role not in ROLES:
                raise InputError("filters.roles", f"there is no role {role!r}", nearest(role, ROLES))

    def complaint(self, messages: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> str | None:
        """The first of the words that occurs, as a reason."""
        pattern = _pattern(tuple(self.words))
        for message in messages:
            if message["role"] in self.roles and (found := pattern.search(message["content"])):
                # Ignoring case takes more for equal than casefold does: the Turkish i with and without its dot.
                same = (word for word in self.words if word.casefold() == found[0].casefold())
                word = next(same, found[0])
                return f"with the word {word!r}"
        return None


@cache
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    # Not \b: that takes every script's letters for parts of the word, and scripts without spaces end words anywhere.
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(f"(?<![0-9A-Za-z_])(?:{'|'.join(map(re.escape, longest_first))})(?![0-9A-Za-z_])", re.IGNORECASE)


@dataclass(frozen=True)
class Predicate:
    """Leave out the rows for which a function of yours is false: a language detector, a length rule, a score."""

    function: str
    """Import path of a function of (messages, row): the messages as they are trained on, the row as it was read."""
    reason: str | None = None
    """How tables call those that it leaves out; by default `by` and the function's name."""

    def find(self) -> Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], bool]:
        """The function.

        Raises:
            InputError: it cannot be found.
        """
        return find_function("filters.function", self.function, "my_package.filters.is_english")

    def complaint(self, messages: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> str | None:
        """The reason, if the function says no."""
        return None if self.find()(messages, row) else self.reason or f"by {self.function.rpartition('.')[2]}"


Criterion = Keywords | Predicate
"""What `Source.filters` lists."""
