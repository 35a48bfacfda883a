"""Tasks of lm-evaluation-harness by our models: `--suite lm_eval:NAME`; results stand beside those of our own tasks."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tulu_lightning.assets.models import resolve_model
from tulu_lightning.checkpoints.identity import weights_digest
from tulu_lightning.errors import InputError, nearest
from tulu_lightning.evaluation.result import Answer, Item, TaskResult
from tulu_lightning.rollout.engines import EngineSettings

__all__ = ["PREFIX", "check_harness", "run_harness", "split_suite"]

PREFIX = "lm_eval:"


def split_suite(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of our tasks, and those of the harness without their prefix."""
    return [n for n in names if not n.startswith(PREFIX)], [n[len(PREFIX) :] for n in names if n.startswith(PREFIX)]


def check_harness(names: Sequence[str], folder: str | None = None) -> Any:
    """The harness's own register of tasks, once it is sure that it has all of these.

    Args:
        names: of its tasks or groups.
        folder: of further tasks, as YAML.

    Raises:
        InputError: the harness is not installed, the folder is not there, or it has no such task.
    """
    if find_spec("lm_eval") is None or find_spec("sacrebleu") is None:
        remedy = "pip install -e '.[eval]'"
        raise InputError(f"--suite {PREFIX}{names[0]}", "lm-evaluation-harness is not installed", remedy)
    if folder is not None and not Path(folder).is_dir():
        raise InputError("--lm_eval_path", f"there is no folder {folder}", "Give one with the tasks' YAML files.")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            raise InputError("--suite", f"lm-evaluation-harness has no {name!r}", nearest(name, manager.all_tasks))
    return manager


def run_harness(
    names: Sequence[str], path: str, engine: EngineSettings, manager: Any, *, limit: int | None = None, seed: int = 0,
    chat: bool = False,
) -> list[TaskResult]:  # fmt: skip
    """Results of a model on tasks of the harness: one for each task, filter and metric that has a number for each item.

    Args:
        names: as of `check_harness`.
        path: of the model.
        engine: what samples, and the dtype of everything.
        manager: what `check_harness` returned.
        limit: the first so many items of each task, as the harness counts.
        seed: of shots that are drawn, and of samples.
        chat: whether questions and shots are turns of the model's chat template.

    Raises:
        InputError: the model does not load, or a task's data set cannot be had.
    """
    from lm_eval.evaluator import simple_evaluate

    from tulu_lightning.evaluation.harness_lm import HarnessLM

    model = HarnessLM(path, engine, seed)
    try:
        done: Any = simple_evaluate(
            model, tasks=list(names), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True,
            apply_chat_template=chat, fewshot_as_multiturn=chat, random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    except (ConnectionError, FileNotFoundError) as error:
        what = f"a data set cannot be had: {str(error).splitlines()[0]}"
        remedy = "Give a machine that reaches the hub, or a task over local files (--lm_eval_path)."
        raise InputError(f"--suite {PREFIX}{' '.join(names)}", what, remedy) from error
    finally:
        model.close()
    digest = weights_digest(resolve_model(path))
    found = []
    for task, samples in done["samples"].items():
        config, told = done["configs"].get(task, {}), done["versions"].get(task)
        settings = _settings(config, told, [limit, seed, chat, engine.kind, engine.dtype])
        version = _version(told)
        for name, items in _by_metric(task, samples).items():
            template = "model" if chat else ""
            metric = name.partition("/")[2]
            bounded = all(0 <= item["score"] <= 1 for item in items)
            named = f"{PREFIX}{name}", version, settings, metric
            found.append(TaskResult(*named, "micro", path, digest, template, items, bounded=bounded))
    return found


def _version(told: Any) -> int:
    """A whole number, where the task says one; it says any text, and the hash of settings has that too."""
    try:
        return max(1, int(float(told)))
    except (TypeError, ValueError):
        return 1


def _settings(config: Mapping[str, Any], version: Any, others: Sequence[Any]) -> str:
    """Hash of everything but the weights. Functions of a task count by their name, so that the hash is the same tomorrow."""
    plain = json.dumps(
        [config, version, *others], sort_keys=True, default=lambda v: getattr(v, "__name__", str(type(v)))
    )
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def _by_metric(task: str, samples: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Item, ...]]:
    """Items by TASK/METRIC, or TASK/METRIC/FILTER where a task has several filters."""
    filters = {sample["filter"] for sample in samples}
    found: dict[str, list[Item]] = defaultdict(list)
    for sample in samples:
        for metric in sample["metrics"]:
            value = sample[metric]
            if not isinstance(value, bool | int | float):
                continue  # perplexities and the like: pairs of numbers that are put together over all items
            name = f"{task}/{metric}" if len(filters) == 1 else f"{task}/{metric}/{sample['filter']}"
            found[name].append(_item(task, sample, float(value)))
    return {name: tuple(items) for name, items in found.items()}


def _item(task: str, sample: Mapping[str, Any], score: float) -> Item:
    text = json.dumps(sample["filtered_resps"], ensure_ascii=False, default=str)
    outcome = "right" if score == 1 else "wrong"
    answer = Answer(text=text, outcome=outcome, score=score, tokens=0, finish="stop")
    return Item(key=f"{task}/{sample['doc_id']}", group="", target=str(sample["target"]), score=score, answers=[answer])
