"""The tasks that a run is scored on while it trains: which, how many items of each, and what their results look like on disk.

    RUN/scores/<moment>.json           the held-out prompts
    RUN/scores/<moment>/<task>.json    a task of `evaluation`

A moment is `before`, `step_<n>` or `after`.
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tulu_lightning.core.gain import Paired
from tulu_lightning.core.promotion import HELD_OUT
from tulu_lightning.core.settings import require
from tulu_lightning.errors import InputError, nearest
from tulu_lightning.evaluation.heldout import Scores
from tulu_lightning.evaluation.judges import check_judges, use_judge
from tulu_lightning.evaluation.result import TaskResult
from tulu_lightning.evaluation.rows import check_used, use_file
from tulu_lightning.evaluation.suite import SUITES, TASKS, find_tasks
from tulu_lightning.evaluation.task import Example, Task

__all__ = ["Scored", "Suite", "moments", "paired", "read_moment", "score_path", "step_moment", "step_of"]

WHERE = "Evaluate.suite"


@dataclass(frozen=True)
class Suite:
    """Tasks of `tulu eval`, asked of the weights in training.

    Raises:
        InputError: a number out of its range, or a limit for a task that is not among them.
    """

    tasks: list[str]
    """Names of tasks and suites (`tulu eval` has the same), or `module.NAME` of a task of your own."""
    limit: int | None = None
    """Items of each task, spread evenly over its data set; null asks all."""
    limits: dict[str, int] = field(default_factory=dict)
    """The limit of single tasks, e.g. `{mmlu: 400}`."""
    data: dict[str, str] = field(default_factory=dict)
    """Data sets that are read from a file, as `tulu eval --data` reads it, e.g. `{gsm8k: rows.jsonl}`."""
    judges: dict[str, str] = field(default_factory=dict)
    """Who judges answers, by the name of the judge (`evaluation.judges`), e.g. `{safety: keywords}`."""
    max_new_tokens: int | None = None
    """A lower cap of an answer than the tasks' own. It is part of the settings that scores are compared by."""

    def __post_init__(self) -> None:
        require(bool(self.tasks), f"{WHERE}.tasks", "empty", f"Name some of: {', '.join([*SUITES, *TASKS])}.")
        for name, value in (("limit", self.limit), ("max_new_tokens", self.max_new_tokens)):
            require(value is None or value >= 1, f"{WHERE}.{name}", value, "Use at least 1, or null.")
        for task, value in self.limits.items():
            require(value >= 1, f"{WHERE}.limits.{task}", value, "Use at least 1.")

    def resolve(self) -> list[Task]:
        """The tasks, each once, in order, with this suite's cap.

        Raises:
            InputError: there is no task or suite of that name, or a limit names a task that is not among them.
        """
        found: dict[str, Task] = {}
        for name in self.tasks:
            for task in [_own_task(name)] if "." in name else find_tasks([name]):
                found.setdefault(task.name, task)
        for name in self.limits:
            if name not in found:
                what = f"there is a limit for {name!r}, which is not among the tasks"
                raise InputError(f"{WHERE}.limits", what, nearest(name, found))
        return [task.capped(self.max_new_tokens) for task in found.values()]

    def read(self) -> list[tuple[Task, list[Example]]]:
        """The tasks with the items that are asked.

        Raises:
            InputError: as `resolve`; or a data set is not there, or a judge; or one is named that no task has.
        """
        tasks = self.resolve()
        for name, path in self.data.items():
            use_file(name, path)
        for name, who in self.judges.items():
            use_judge(name, who)
        found = [(task, task.examples(self.limits.get(task.name, self.limit))) for task in tasks]
        check_used(f"{WHERE}.data.")
        check_judges(f"{WHERE}.judges.")
        return found


def _own_task(name: str) -> Task:
    module, _, attribute = name.rpartition(".")
    try:
        task = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        remedy = "Give module.NAME of a task that can be imported, or the name of one of `tulu eval`."
        raise InputError(f"{WHERE}.tasks", f"there is no {name!r} ({error})", remedy) from error
    if not isinstance(task, Task):
        remedy = "Give an evaluation.task.Task."
        raise InputError(f"{WHERE}.tasks", f"{name!r} is a {type(task).__name__}", remedy)
    return task


# On disk ----------------------------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """The score of one task at one moment, with what it takes to pair it with another."""

    task: str
    score: float
    low: float
    high: float
    """Ends of the interval, of confidence 0.95."""
    n: int
    settings: str
    """Hash of everything but the weights."""
    version: int
    per_item: tuple[float, ...]
    keys: tuple[str, ...]
    groups: tuple[str, ...] | None
    """Of each item, where the score is the mean of groups' means."""
    weights: str = ""
    """Hash of the weights; empty where it was not taken."""


def step_moment(step: int) -> str:
    """What the moment after so many steps is called."""
    return f"step_{step:06d}"


def step_of(moment: str, end: int) -> int:
    """After how many steps a moment is; `end` for `after`."""
    return {"before": 0, "after": end}[moment] if moment in ("before", "after") else int(moment.removeprefix("step_"))


def score_path(run: Path, moment: str, task: str) -> Path:
    """The file of a task's result."""
    scores = run / "scores"
    return scores / f"{moment}.json" if task == HELD_OUT else scores / moment / f"{task}.json"


def scored(result: Scores | TaskResult) -> Scored:
    """A result as the promotion and the alerts read it."""
    low, high = result.interval
    if isinstance(result, Scores):
        keys = tuple(json.dumps([i["row"], i["prompt"], i["target"]]) for i in result.items)
        name, score, groups, weights = HELD_OUT, result.accuracy, None, result.weights
    else:
        keys = tuple(item["key"] for item in result.items)
        name, score, weights = result.task, result.score, result.model_digest
        groups = None if result.average == "micro" else tuple(item["group"] for item in result.items)
    per_item = tuple(result.per_item)
    return Scored(name, score, low, high, result.n, result.settings, result.version, per_item, keys, groups, weights)


def read_moment(run: Path, moment: str) -> dict[str, Scored]:
    """All scores of one moment, by task; empty if there are none.

    Raises:
        InputError: a file holds something else.
    """
    found = [scored(TaskResult.from_json(path)) for path in sorted((run / "scores" / moment).glob("[!.]*.json"))]
    if (path := score_path(run, moment, HELD_OUT)).exists():
        found.insert(0, scored(Scores.from_json(path)))
    return {one.task: one for one in found}


def moments(run: Path) -> list[str]:
    """The moments of which there are scores: `before`, the steps in their order, `after`."""
    names = {path.stem if path.suffix == ".json" else path.name for path in (run / "scores").glob("[!.]*")}
    steps = sorted(name for name in names if name.startswith("step_"))
    return [name for name in ("before", *steps, "after") if name in names]


def paired(before: Mapping[str, Scored], after: Mapping[str, Scored], tasks: Sequence[str]) -> dict[str, Paired]:
    """The scores of two moments, item by item.

    Raises:
        InputError: a task was not scored at one of them, or was asked something else.
    """
    remedy = "Evaluate both checkpoints on the same items with the same settings."
    result = {}
    for task in tasks:
        for when, scores in (("start", before), ("later", after)):
            if task not in scores:
                raise InputError("compare", f"there are no scores of the {when} weights on {task}", remedy)
        here, there = before[task], after[task]
        where = "" if task == HELD_OUT else f" of {task}"
        for name in ("keys", "settings", "version"):
            values: tuple[Any, Any] = getattr(here, name), getattr(there, name)
            if values[0] != values[1]:
                label, told = ("items", (here.n, there.n)) if name == "keys" else (name, values)
                raise InputError("compare", f"the {label}{where} differ ({told[0]} and {told[1]})", remedy)
        result[task] = Paired(here.per_item, there.per_item, there.groups)
    return result
