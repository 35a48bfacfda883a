"""IFEval (Zhou et al. 2023): does a response follow the instructions that a program can check? Official semantics.

A target is a JSON object with `instruction_id_list` and, in the same order, `kwargs` (an object for each, null where
there are no arguments). Other fields, such as `prompt` and `key`, are left alone, so a row of the benchmark is a target.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from tulu_lightning.types import Verdict
from tulu_lightning.verifiers.if_text import relaxed
from tulu_lightning.verifiers.ifeval_rules import RULES
from tulu_lightning.verifiers.ifeval_schema import Rule, find_rule, read_arguments

__all__ = ["Asked", "IFEval", "judge", "read_json"]

Asked = list[tuple[Rule, dict[str, Any]]]
"""What is asked of a response: rules with their arguments."""


@dataclass(frozen=True)
class IFEval:
    """Right when every instruction is followed; unparseable when the response is blank."""

    loose: bool = False
    """An instruction counts as followed if it is in any of eight readings of the response: without its first line,
    its last, or both, with and without asterisks."""
    partial: bool = False
    """The score of a wrong response is the share of instructions that it follows, not 0."""
    runs: ClassVar = "pool"

    def __call__(self, response: str, target: str) -> Verdict:
        """Score 1 or 0, or the share that is followed.

        Raises:
            ValueError: the target is not usable; `complaint` says so beforehand.
        """
        return judge(_read(target), response, self.loose, self.partial)

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used (an unknown instruction, a missing argument, ...), or None."""
        try:
            asked = _read(target)
        except ValueError as error:
            return str(error)
        return next((found for rule, arguments in asked if (found := rule.complaint(arguments))), None)

    def followed(self, response: str, target: str) -> list[bool]:
        """Instruction by instruction, whether a response that is not blank follows it.

        Raises:
            ValueError: as when called.
        """
        return _followed(_read(target), response, self.loose)


def judge(asked: Asked, response: str, loose: bool, partial: bool) -> Verdict:
    """The verdict on a response of which several things are asked."""
    if not response.strip():
        return Verdict("unparseable", 0.0)
    followed = _followed(asked, response, loose)
    if all(followed):
        return Verdict("right", 1.0)
    return Verdict("wrong", sum(followed) / len(followed) if partial else 0.0)


def _followed(asked: Asked, response: str, loose: bool) -> list[bool]:
    def readings() -> Iterable[str]:
        return relaxed(response) if loose else (response,)

    return [any(rule.follows(reading, **arguments) for reading in readings()) for rule, arguments in asked]


def read_json(target: str) -> Any:
    """A target that must be JSON.

    Raises:
        ValueError: it is not; the text says so.
    """
    try:
        return json.loads(target)
    except (ValueError, RecursionError) as error:
        shown = target if len(target) <= 60 else f"{target[:57]}..."
        raise ValueError(f"{shown!r} is not JSON ({error})") from None


def _read(target: str) -> Asked:
    row = read_json(target)
    if not isinstance(row, dict) or "instruction_id_list" not in row:
        raise ValueError(f"{target[:60]!r} is not an object with instruction_id_list and kwargs")
    names = row["instruction_id_list"]
    if not isinstance(names, list) or not names:
        raise ValueError(f"instruction_id_list is {names!r}, not a list of at least one id")
    given = row.get("kwargs")
    if given is None:
        given = [None] * len(names)
    if not isinstance(given, list) or len(given) != len(names):
        count = len(given) if isinstance(given, list) else "no list of"
        raise ValueError(f"there are {len(names)} instructions and {count} kwargs")
    asked = []
    for name, arguments in zip(names, given, strict=True):
        rule = find_rule(RULES, name)
        asked.append((rule, read_arguments(name, rule, arguments)))
    return asked
