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
    "agieval": Place("agieval", "AGIEVAL"),
    "alpaca_eval": Place("alpaca_eval", "ALPACA_EVAL"),
    "alpaca_eval_raw": Place("alpaca_eval", "ALPACA_EVAL_RAW"),
    "bbh": Place("bbh", "BBH"),
    "bigcodebench_hard": Place("bigcodebench", "BIGCODEBENCH_HARD"),
    "deepmind_math": Place("deepmind_math", "DEEPMIND_MATH"),
    "do_anything_now": Place("safety", "DO_ANYTHING_NOW"),
    "drop": Place("drop", "DROP"),
    "gpqa": Place("gpqa", "GPQA"),
    "gsm8k": Place("gsm8k", "GSM8K"),
    "gsm8k_plain": Place("gsm8k", "GSM8K_PLAIN"),
    "harmbench": Place("safety", "HARMBENCH"),
    "href": Place("href", "HREF"),
    "humaneval": Place("humaneval", "HUMANEVAL"),
    "humaneval_plain": Place("humaneval", "HUMANEVAL_PLAIN"),
    "humaneval_plus": Place("humaneval_plus", "HUMANEVAL_PLUS"),
    "humaneval_plus_plain": Place("humaneval_plus", "HUMANEVAL_PLUS_PLAIN"),
    "ifeval": Place("ifeval", "IFEVAL"),
    "ifeval_ood": Place("ifeval_ood", "IFEVAL_OOD"),
    "ifeval_strict": Place("ifeval", "IFEVAL_STRICT"),
    "jailbreaktrigger": Place("safety", "JAILBREAK_TRIGGER"),
    "math": Place("math", "MATH"),
    "math_plain": Place("math", "MATH_PLAIN"),
    "mmlu": Place("mmlu", "MMLU"),
    "mmlu_mc": Place("mmlu", "MMLU_MC"),
    "mmlu_mc_plain": Place("mmlu", "MMLU_MC_PLAIN"),
    "mmlu_pro": Place("mmlu_pro", "MMLU_PRO"),
    "popqa": Place("popqa", "POPQA"),
    "safety": Place("safety", "SAFETY"),
    "truthfulqa_mc2": Place("truthfulqa", "TRUTHFULQA_MC2"),
    "truthfulqa_mc2_plain": Place("truthfulqa", "TRUTHFULQA_MC2_PLAIN"),
    "wildguardtest": Place("safety", "WILDGUARD_TEST"),
    "wildjailbreak": Place("safety", "WILDJAILBREAK"),
    "xstest": Place("safety", "XSTEST"),
}
"""All tasks."""
SUITES: Mapping[str, Sequence[str]] = {
    "tulu3_dev": (
        *("mmlu", "popqa", "truthfulqa_mc2", "bbh", "drop", "math", "gsm8k"),
        *("humaneval", "humaneval_plus", "ifeval", "alpaca_eval", "safety"),
    ),
    "tulu3_safety": (
        *("harmbench", "xstest", "wildguardtest", "jailbreaktrigger", "do_anything_now", "wildjailbreak"),
    ),
    "tulu3_unseen": ("gpqa", "mmlu_pro", "agieval", "deepmind_math", "bigcodebench_hard", "ifeval_ood", "href"),
}
"""Tülu 3's development, safety and unseen evaluations, in the order of the paper's tables 6, 25 and 33. The mean over
the development suite is the paper's: the six safety sets count as one."""


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
