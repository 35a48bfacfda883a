"""What `tulu eval` does once its arguments are read: load, score task after task, write, compare, show."""

import gc
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tulu_lightning.assets.models import generation_eos, load_tokenizer, resolve_model
from tulu_lightning.checkpoints.identity import weights_digest
from tulu_lightning.core.stats import mean_of
from tulu_lightning.data import chat
from tulu_lightning.evaluation.asking import Asker
from tulu_lightning.evaluation.ranks import collect, rank_sheet
from tulu_lightning.evaluation.result import Item, TaskResult, compare_results
from tulu_lightning.evaluation.run import Model, finished, head_of, judge_rest, run_task
from tulu_lightning.evaluation.sheet import is_answered
from tulu_lightning.evaluation.task import Example, Task, digest_of
from tulu_lightning.files import write_whole
from tulu_lightning.models.limits import read_limits
from tulu_lightning.progress import Progress
from tulu_lightning.rollout.engines import EngineSettings, build_engine
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.rollout.together import ALONE, Together, share_of

__all__ = ["Settings", "check_models", "evaluate_models", "open_model", "show"]


class Settings(NamedTuple):
    """How models are run, whatever is asked."""

    out: Path
    template: str | None
    """Name of a chat template; None takes the model's own."""
    engine: EngineSettings
    seed: int
    together: Together = ALONE
    """The processes that share the items."""


def open_model(path: str, settings: Settings) -> Model:
    """Load a model for evaluation.

    Args:
        path: folder, name or hub id.
        settings: how it is run.

    Raises:
        InputError: the model does not load, or its tokens are not those of the named template.
    """
    folder = str(resolve_model(path))
    tokenizer = load_tokenizer(path)
    template = None if settings.template is None else chat.chat_template(settings.template, tokenizer)
    eos = generation_eos(folder)
    if template is None:
        stops = tuple(sorted({*eos, int(tokenizer.eos_token_id)}))  # type: ignore[arg-type]
    else:
        stops = chat.stop_ids(tokenizer, template, eos)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = build_engine(settings.engine, lambda dtype: LocalEngine.from_folder(folder, dtype, device), folder)
    manner = (settings.engine.kind, settings.engine.dtype)
    return Model(path, weights_digest(folder), engine, Asker(tokenizer, template, path), stops, manner)


def check_models(
    models: Sequence[str], tasks: Sequence[Task], examples: Sequence[Sequence[Example]], template: str | None
) -> None:
    """Refuse a model that cannot be asked, before any weights load.

    Raises:
        InputError: a task is a chat, and the model has no chat template and none is named; a model is not there, or has
            too few positions for a prompt with its longest answer.
    """
    for path in models:
        tokenizer = load_tokenizer(path)
        asker = Asker(tokenizer, None if template is None else chat.chat_template(template, tokenizer), path)
        asker.check(tasks)
        positions = read_limits(str(resolve_model(path))).positions
        for task, each in zip(tasks, examples, strict=True):
            asker.check_room(task, each, positions, "Set --max_new_tokens lower, or leave the task out.")


def evaluate_models(
    models: Sequence[str], tasks: Sequence[Task], examples: Sequence[Sequence[Example]], settings: Settings
) -> list[list[TaskResult]]:
    """Results of each model on each task; finished items are kept under `settings.out` and not done again.

    Raises:
        InputError: see `open_model`.
    """
    results = []
    check_models(models, tasks, examples, settings.template)
    for path in models:
        model = open_model(path, settings)
        folder = settings.out / model.digest[:12]
        try:
            results.append(
                [_scored(task, each, model, folder, settings) for task, each in zip(tasks, examples, strict=True)]
            )
        finally:
            model.engine.close()
            gc.collect()
    return results


def _scored(task: Task, examples: Sequence[Example], model: Model, folder: Path, settings: Settings) -> TaskResult:
    """A task's result; every process has it, and the first one writes."""
    together, head = settings.together, head_of(task, model, settings.seed)
    # A name for each manner of asking: one run does not begin the sheet of another anew.
    sheet = folder / f"{task.name}.{digest_of(head)[:8]}.items.jsonl"
    found: dict[str, Item] = together.gather(_there(task, examples, sheet, head) if together.first else {}, "items")[0]
    there = {example.key: found[example.key] for example in examples if is_answered(example, found)}
    mine = share_of([each for each in examples if each.key not in there], together.rank, together.ranks)
    kept = sheet if together.ranks == 1 else rank_sheet(sheet, together.rank)
    before = len(there)
    with Progress(task.name, len(examples), unit="items", stream=None if together.first else io.StringIO()) as progress:

        def told(done: int, _total: int) -> None:
            progress.update(min(len(examples), before + done * together.ranks))

        def answer() -> TaskResult:
            return run_task(task, mine, model, kept, settings.seed, told, whole=examples)

        own = together.run(answer, f"answers to {task.name}")
    for items in together.gather(own.items, f"answers to {task.name}"):
        there |= {item["key"]: item for item in items}
    result = replace(own, items=finished(task, [there[example.key] for example in examples]))
    if together.first:
        collect(sheet, head)
        result.to_json(folder / f"{task.name}.json")
    return result


def _there(task: Task, examples: Sequence[Example], sheet: Path, head: dict[str, Any]) -> dict[str, Item]:
    """Items that earlier starts finished, or had answers to."""
    whole = collect(sheet, head)
    judge_rest(task, examples, whole)
    return whole.items


def show(results: Sequence[Sequence[TaskResult]], out: Path) -> None:
    """Print the scores as a table, with paired differences where there are two models, and write them to `results.json`.

    What other commands wrote there stays.
    """
    first, *others = results
    table = Table(box=box.SIMPLE_HEAD, title=_title(results), title_justify="left", padding=(0, 1))
    headings = ["Task", "n", "Score", *(["Against", "Difference"] if others else []), "Metric"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("Task", "Metric") else "right", overflow="fold")
    record: list[dict[str, Any]] = []
    differences: list[tuple[float, float, float]] = []
    for place, result in enumerate(first):
        beside = [result, *(other[place] for other in others)]
        shares = all(each.bounded for each in beside)  # else a number of the metric's own, which is no percentage
        scores = [_share(each.score, *each.interval, scale=100 if shares else 1) for each in beside]
        cells, entry = [result.task, str(result.n), *scores], dict(result.summary())
        if others:
            other = others[0][place]
            difference = compare_results(other, result)
            points = difference.difference, difference.low, difference.high
            differences += [points] if shares else []
            cells += [_points(*points, scale=100 if shares else 1)]
            entry |= {"against": other.summary(), "difference": asdict(difference)}
        record.append(entry)
        table.add_row(*(Text(cell) for cell in (*cells, result.metric)))
    averaged = [place for place in range(len(first)) if all(model[place].bounded for model in results)]
    if len(averaged) > 1:
        scored = [[(model[i].score, *model[i].interval) for i in averaged] for model in results]
        means = [_share(*mean_of(each)) for each in scored]
        gained = [_points(*mean_of(differences))] if differences else []
        table.add_row(*(Text(cell) for cell in ("mean", "", *means, *gained, "each task counts the same")))
    Console().print(table)
    out.mkdir(parents=True, exist_ok=True)
    kept = [*_others(out / "results.json", record), *record]
    write_whole(out / "results.json", json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def _others(path: Path, record: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of earlier commands that this one has nothing new to say of: other weights, tasks, settings or comparisons."""
    if not path.exists():
        return []
    try:
        before: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return [entry for entry in before if _entry_key(entry) not in {_entry_key(new) for new in record}]
    except (ValueError, TypeError, AttributeError) as error:
        aside = path.with_name("results.unreadable.json")
        path.replace(aside)
        print(f"{path} is no list of results ({type(error).__name__}): it is {aside} now", file=sys.stderr)
        return []


def _entry_key(entry: dict[str, Any]) -> tuple[Any, ...]:
    against = entry.get("against") or {}
    return entry.get("task"), entry.get("settings"), entry.get("model_digest"), against.get("model_digest")


def _title(results: Sequence[Sequence[TaskResult]]) -> str:
    names = " against ".join(model[0].model for model in results)
    return f"{names}: scores in %, with {results[0][0].confidence:.0%} intervals"


def _share(score: float, low: float, high: float, scale: float = 100) -> str:
    return f"{scale * score:.1f} [{scale * low:.1f}, {scale * high:.1f}]"


def _points(difference: float, low: float, high: float, scale: float = 100) -> str:
    return f"{scale * difference:+.1f} [{scale * low:+.1f}, {scale * high:+.1f}]"
