"""What a constraint is, and how its arguments are read out of a row: every bad one is named before training starts."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tulu_lightning.errors import nearest

__all__ = [
    "Reader",
    "Rule",
    "find_rule",
    "letter",
    "one_of",
    "pattern",
    "patterns",
    "read_arguments",
    "text",
    "texts",
    "whole",
]

Reader = Callable[[Any], Any]
"""Takes a value out of JSON and returns it as the rule wants it, or raises ValueError with what it is instead."""


class Rule(NamedTuple):
    """One constraint: a function of the response and of arguments that a row gives."""

    follows: Callable[..., bool]
    """Called with the response and the arguments by name."""
    arguments: Mapping[str, Reader] = {}
    """By name; all of them are needed."""
    complaint: Callable[[Mapping[str, Any]], str | None] = lambda arguments: None
    """What is wrong between arguments that are each well-formed, or with the machine; None if nothing is."""


def find_rule(rules: Mapping[str, Rule], name: object) -> Rule:
    """The rule of that name.

    Raises:
        ValueError: there is none; offers the nearest.
    """
    if not isinstance(name, str) or name not in rules:
        raise ValueError(f"there is no constraint {name!r}: {nearest(str(name), rules)}")
    return rules[name]


def read_arguments(name: str, rule: Rule, given: object) -> dict[str, Any]:
    """The arguments of a rule, checked one by one; those that are null count as not given.

    Raises:
        ValueError: one is missing, unknown or malformed.
    """
    if not isinstance(given, Mapping | None):
        raise ValueError(f"the arguments of {name} are {_shown(given)}, not an object")
    present = {key: value for key, value in (given or {}).items() if value is not None}
    for key in present:
        if key not in rule.arguments:
            offer = nearest(key, rule.arguments) if rule.arguments else "It takes none."
            raise ValueError(f"{name} has no argument {key!r}: {offer}")
    arguments = {}
    for key, reader in rule.arguments.items():
        if key not in present:
            raise ValueError(f"{name} lacks its argument {key!r}")
        try:
            arguments[key] = reader(present[key])
        except ValueError as error:
            raise ValueError(f"{key} of {name} is {_shown(present[key])}, {error}") from None
    return arguments


def whole(at_least: int = 0) -> Reader:
    """Reads a whole number from `at_least` up; 3.0 is one too, because tables with gaps turn whole numbers to that."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < at_least:
            raise ValueError(f"not a whole number from {at_least} up")
        return int(value)

    return read


def text(value: Any) -> str:
    """A text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("not a text")
    return value


def letter(value: Any) -> str:
    """A single character."""
    if not isinstance(value, str) or len(value.strip()) != 1:
        raise ValueError("not one character")
    return value.strip()


def texts(value: Any) -> list[str]:
    """At least one text, none of them blank."""
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item.strip() for item in value):
        raise ValueError("not a list of texts")
    return value


def pattern(value: Any) -> str:
    """A text that is a regular expression."""
    try:
        re.compile(text(value))
    except re.error as error:
        raise ValueError(f"which is read as a regular expression and is none ({error}): escape it") from None
    return value


def patterns(value: Any) -> list[str]:
    """At least one text, each a regular expression."""
    return [pattern(item) for item in texts(value)]


def one_of(*choices: str) -> Reader:
    """Reads one of the given texts."""

    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"none of {', '.join(map(repr, choices))}")
        return value

    return read


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
