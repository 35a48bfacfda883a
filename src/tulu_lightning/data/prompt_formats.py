"""Prompt rows of any format to messages and the checks of a response. Every complaint names the row and the value."""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tulu_lightning.data import filters
from tulu_lightning.data.chat import Message
from tulu_lightning.data.formats import own_row
from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.prompt_source import PromptSource, check_route
from tulu_lightning.data.readers import field, messages_of, shown, text_of
from tulu_lightning.data.sources import Row
from tulu_lightning.errors import InputError, nearest
from tulu_lightning.types import Check
from tulu_lightning.verifiers.registry import Verifiers

__all__ = ["ROUTES", "PromptRow", "Rules", "read_prompt"]

ROUTES = {"gsm8k": "gsm8k", "MATH": "math", "ifeval": "ifeval_tulu"}
"""Verifier by `dataset` of a row, as in Tülu 3's own set (allenai/RLVR-GSM-MATH-IF-Mixed-Constraints)."""
CHECK_FIELDS = ("verifier", "ground_truth", "weight")


class Rules(NamedTuple):
    """What a run knows of verifiers."""

    verifiers: Verifiers
    routes: Mapping[str, str]
    """Verifier by `dataset`."""
    exemplars: Mapping[str, str]
    """What stands before each question, by name of the source; `prompt_source.exemplars_of`."""


class PromptRow(NamedTuple):
    """A question, and how its answers are judged."""

    messages: list[Message]
    checks: tuple[Check, ...]
    dataset: str
    """What scores are reported by: the row's `dataset`, or the source's, or the source's name."""


def read_prompt(source: PromptSource, number: int, row: Row, rules: Rules) -> PromptRow:
    """A prompt row, by the source's `read`.

    A row has `messages` (ending with a user turn), `ground_truth` and, if it is not to be routed by its `dataset`,
    `verifier`; or instead of the last two `checks`, a list of {verifier, ground_truth, weight}: a check without
    `ground_truth` uses the row's, `weight` is 1 if left out. A `ground_truth` that is an object or a list is handed on as
    JSON text.

    Args:
        source: where the row is from.
        number: its number there, from 1.
        row: its fields, `columns` applied.
        rules: verifiers and routes.

    Raises:
        InputError: a field is missing or malformed, the row leads to no verifier, or the verifier cannot use the target.
        LeftOut: a filter of the source, or its reader, says so.
    """
    where = source.row_name(number)
    made = _made(where, source, row)
    messages = messages_of(where, "messages", field(where, made, "messages"))
    if messages[-1]["role"] != "user":
        raise InputError(where, "messages does not end with a user turn", "Leave the answer to the model.")
    checks = _checks(where, source, made, rules)
    filters.check(source, number, messages, row)
    if source.pass_rate is not None and (reason := source.pass_rate.complaint(where, {**row, **made})):
        raise LeftOut(reason)
    return PromptRow(
        _with_exemplars(where, source, messages, rules), checks, _dataset(where, source, made) or source.name
    )


def _made(where: str, source: PromptSource, row: Row) -> Row:
    if "." in source.read:
        return dict(own_row(where, source.read, row, "messages and ground_truth"))
    return row if source.read == "messages" else READERS[source.read](where, row)


def _with_exemplars(where: str, source: PromptSource, messages: list[Message], rules: Rules) -> list[Message]:
    if source.few_shot is None:
        return messages
    *before, question = messages
    if any(message["role"] != "system" for message in before):
        what = f"few_shot is set, and the row has {len(messages)} turns"
        raise InputError(where, what, "Leave few_shot out: exemplars go before a lone question.")
    return [*before, {**question, "content": source.few_shot.ask(rules.exemplars[source.name], question["content"])}]


# Checks -----------------------------------------------------------------------------------------------------------


def _checks(where: str, source: PromptSource, row: Row, rules: Rules) -> tuple[Check, ...]:
    listed = row.get("checks")
    if listed is None:
        target = _target(where, "ground_truth", field(where, row, "ground_truth"))
        return (_usable(where, Check(_verifier(where, source, row, rules), target), rules),)
    if row.get("verifier") is not None:
        raise InputError(where, "both verifier and checks are given", "Give one of them.")
    if not isinstance(listed, list) or not listed:
        remedy = 'Give at least one {"verifier": ..., "ground_truth": ..., "weight": ...}.'
        raise InputError(where, f"checks is {shown(listed)}, not a list of checks", remedy)
    return tuple(_check(where, f"checks[{i}]", given, row, rules) for i, given in enumerate(listed))


def _check(where: str, name: str, given: Any, row: Row, rules: Rules) -> Check:
    if not isinstance(given, dict) or given.get("verifier") is None:
        raise InputError(where, f"{name} is {shown(given)}", 'Give it as {"verifier": ..., "ground_truth": ...}.')
    if odd := next((key for key in given if key not in CHECK_FIELDS), None):
        raise InputError(where, f"{name} has the field {odd!r}, which nothing reads", nearest(str(odd), CHECK_FIELDS))
    target = given.get("ground_truth")
    if target is None:
        target = field(where, row, "ground_truth")
    weight = given.get("weight")
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise InputError(where, f"weight of {name} is {shown(weight)}", "Use a number above 0.")
    verifier = text_of(where, f"verifier of {name}", given["verifier"])
    check = Check(verifier, _target(where, f"ground_truth of {name}", target), float(weight))
    return _usable(f"{where}, {name}", check, rules)


def _usable(where: str, check: Check, rules: Rules) -> Check:
    try:
        found = rules.verifiers.complaint(check.verifier, check.target)
    except InputError as error:
        raise InputError(where, error.what, error.remedy) from None
    if found:
        what = f"verifier {check.verifier!r} cannot use ground_truth: {found}"
        raise InputError(where, what, "Correct the target.")
    return check


def _verifier(where: str, source: PromptSource, row: Row, rules: Rules) -> str:
    """The row's own, else the source's, else the one that the row's data set leads to."""
    if row.get("verifier") is not None:
        return text_of(where, "verifier", row["verifier"])
    if source.verifier is not None:
        return source.verifier
    dataset = _dataset(where, source, row)
    if dataset is None:
        what = "verifier is null" if "verifier" in row else f"the row has no field 'verifier' (it has {', '.join(row)})"
        remedy = "Add 'verifier' or 'dataset', or set verifier or dataset of the source."
        raise InputError(where, what, remedy)
    check_route(where, dataset, rules.routes)
    return rules.routes[dataset]


def _dataset(where: str, source: PromptSource, row: Row) -> str | None:
    given = row.get("dataset")
    if given is not None:
        return text_of(where, "dataset", given)
    return source.dataset or DATASETS.get(source.read)


def _target(where: str, name: str, value: Any) -> str:
    if isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False)
    return text_of(where, name, value)


# Raw rows ---------------------------------------------------------------------------------------------------------


def _gsm8k(where: str, row: Row) -> dict[str, Any]:
    """`question` and `answer`, whose number stands behind `####`; commas between digits are no part of it."""
    question = text_of(where, "question", field(where, row, "question"))
    answer = text_of(where, "answer", field(where, row, "answer"))
    _, mark, number = answer.rpartition("####")
    if not mark:
        raise InputError(where, f"answer is {shown(answer)}, without '####'", "Put the number behind '####'.")
    return _asked(row, question, re.sub(r"(?<=\d),(?=\d)", "", number.strip()))


def _math(where: str, row: Row) -> dict[str, Any]:
    """`problem` and `solution`, whose answer stands in the last `\\boxed{}`; the release skips those without one."""
    problem = text_of(where, "problem", field(where, row, "problem"))
    answer = boxed(text_of(where, "solution", field(where, row, "solution")))
    if answer is None:
        raise LeftOut("without a boxed answer")
    return _asked(row, problem, answer)


def boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{...}` or `\\fbox{...}`, braces balanced, or behind the last `\\boxed `."""
    found = list(re.finditer(r"\\(?:boxed|fbox)(?:\s*\{|\s+([^\s{$]+))", text))
    if not found:
        return None
    if (last := found[-1])[1] is not None:
        return last[1]
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[last.end() :], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return text[last.end() : last.end() + brace.start()]
    return None


def _asked(row: Row, question: str, target: str) -> dict[str, Any]:
    return {**row, "messages": [{"role": "user", "content": question}], "ground_truth": target}


READERS: dict[str, Callable[[str, Row], dict[str, Any]]] = {"gsm8k": _gsm8k, "math": _math}
"""Readers of raw rows."""
DATASETS = {"gsm8k": "gsm8k", "math": "MATH"}
"""`dataset` of what they make, if neither row nor source says otherwise."""
