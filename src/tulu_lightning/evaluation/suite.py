"""Suites of tasks by name; a task's module is imported when a suite that holds it is asked for."""

import importlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tulu_lightning.errors import InputError, nearest
from tulu_lightning.evaluation.task import Task

__all__ = ["SUITES", "TASKS", "Place", "find_task", "find_tasks"]


class Place(NamedTuple):
    """Where a task is defined."""

    module: str
    """Below `tulu_lightning.evaluation.tasks`."""
    name: str


TASKS: Mapping[str, Place] = {
    "bbh": Place("bbh", "BBH"),
    "drop": Place("drop", "DROP"),
    "gsm8k": Place("gsm8k", "GSM8K"),
    "gsm8k_plain": Place("gsm8k", "GSM8K_PLAIN"),
    "humaneval": Place("humaneval", "HUMANEVAL"),
    "humaneval_plain": Place("humaneval", "HUMANEVAL_PLAIN"),
    "humaneval_plus": Place("humaneval_plus", "HUMANEVAL_PLUS"),
    "humaneval_plus_plain": Place("humaneval_plus", "HUMANEVAL_PLUS_PLAIN"),
    "ifeval": Place("ifeval", "IFEVAL"),
    "ifeval_strict": Place("ifeval", "IFEVAL_STRICT"),
    "math": Place("math", "MATH"),
    "math_plain": Place("math", "MATH_PLAIN"),
    "mmlu": Place("mmlu", "MMLU"),
    "mmlu_mc": Place("mmlu", "MMLU_MC"),
    "mmlu_mc_plain": Place("mmlu", "MMLU_MC_PLAIN"),
    "popqa": Place("popqa", "POPQA"),
    "truthfulqa_mc2": Place("truthfulqa", "TRUTHFULQA_MC2"),
    "truthfulqa_mc2_plain": Place("truthfulqa", "TRUTHFULQA_MC2_PLAIN"),
}
"""All tasks."""
SUITES: Mapping[str, Sequence[str]] = {
    "tulu3_dev": (
        *("mmlu", "popqa", "truthfulqa_mc2", "bbh", "drop", "math", "gsm8k"),
        *("humaneval", "humaneval_plus", "ifeval"),
    ),
    "tulu3_unseen": (),
}
"""Tülu 3's development and unseen evaluations (table 24), in the paper's order."""


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        InputError: there is none; offers the nearest.
    """
    if name not in TASKS:
        raise InputError("suite", f"there is no task or suite {name!r}", nearest(name, [*TASKS, *SUITES]))
    place = TASKS[name]
    return getattr(importlib.import_module(f"tulu_lightning.evaluation.tasks.{place.module}"), place.name)


def find_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks behind names of tasks and suites, each once, in order.

    Raises:
        InputError: a name is unknown.
    """
    wanted = dict.fromkeys(task for name in names for task in SUITES.get(name, (name,)))
    return [find_task(name) for name in wanted]
