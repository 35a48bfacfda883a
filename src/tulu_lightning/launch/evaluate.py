"""`tulu eval`: score a model folder on tasks, print a table, keep everything as JSON, and compare with a second model."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tulu_lightning.errors import InputError

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """The command line's."""
    found = argparse.ArgumentParser(prog="tulu eval", description=__doc__, allow_abbrev=False)
    found.add_argument("--model", required=True, metavar="DIR", help="model folder, name or hub id")
    found.add_argument("--suite", required=True, nargs="+", metavar="NAME", help="suites and tasks, e.g. tulu3_dev")
    found.add_argument("--against", metavar="DIR", help="a second model: paired differences are shown")
    found.add_argument("--out", metavar="DIR", default="runs/eval", help="where results go and go on (%(default)s)")
    found.add_argument("--limit", type=int, metavar="N", help="so many items of each task, spread evenly")
    found.add_argument("--max_new_tokens", type=int, metavar="N", help="a lower cap of an answer than the tasks' own")
    found.add_argument("--template", metavar="NAME", help="chat template; the model's own by default")
    found.add_argument("--data", action="append", default=[], metavar="SET=FILE", help="read a data set from a file")
    found.add_argument("--judge", action="append", default=[], metavar="NAME=WHO", help="MODEL@URL, folder or keywords")
    found.add_argument("--engine", choices=("local", "vllm", "server"), default="local")
    found.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--lm_eval_path", metavar="DIR", help="further tasks of lm-evaluation-harness (lm_eval:NAME)")
    found.add_argument("--lm_eval_chat", action="store_true", help="ask the harness's tasks in the chat template")
    found.add_argument("--devices", type=int, default=1, metavar="N", help="processes that share the items, one a GPU")
    return found


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments.

    Returns:
        Exit status.

    Raises:
        InputError: an unknown suite, data that are not there, a judge that is down, a model without a chat template.
    """
    options = parser().parse_args(list(argv))
    for name in ("limit", "max_new_tokens", "devices"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise InputError(f"--{name}", f"is {value}", "Use at least 1.")
    from tulu_lightning.evaluation.harness import check_harness, split_suite
    from tulu_lightning.evaluation.judges import check_judges, use_judge
    from tulu_lightning.evaluation.rows import check_used, use_file
    from tulu_lightning.evaluation.suite import find_tasks

    own, harness = split_suite(options.suite)
    if harness and options.devices > 1:
        raise InputError("--devices", "is above 1, and lm_eval: tasks run in one process", "Run them on their own.")
    _check_read(options, own, harness)
    manager = check_harness(harness, options.lm_eval_path) if harness else None
    tasks = [task.capped(options.max_new_tokens) for task in find_tasks(own)]
    for option, pairs, use in (("--data", options.data, use_file), ("--judge", options.judge, use_judge)):
        for given in pairs:
            name, _, value = given.partition("=")
            if not (name and value):
                raise InputError(option, f"is {given!r}", f"Give NAME={'FILE' if use is use_file else 'WHO'}.")
            use(name, value)
    examples = [task.examples(options.limit) for task in tasks]  # every data set is there, or nothing is loaded
    check_used()
    check_judges()
    from tulu_lightning.evaluation.command import check_models, evaluate_models, show
    from tulu_lightning.evaluation.ranks import join, start

    models = [options.model, *([options.against] if options.against else [])]
    if options.devices > 1:
        check_models(models, tasks, examples, options.template)  # once, and not by every process
        return start(options.devices, _without_devices(argv))
    settings = _settings(options)._replace(together=join())
    results = evaluate_models(models, tasks, examples, settings)
    if harness:
        results = [
            [*done, *_by_harness(harness, path, manager, options, settings)]
            for done, path in zip(results, models, strict=True)
        ]
    if settings.together.first:
        show(results, Path(options.out))
    return 0


def _check_read(options: argparse.Namespace, own: Sequence[str], harness: Sequence[str]) -> None:
    """Refuse options that nothing would read: those of the harness without a task of it, and ours with nothing else."""
    if not harness:
        where, names = "our own tasks", ("lm_eval_path", "lm_eval_chat")
    else:
        where, names = "lm_eval: tasks", () if own else ("template", "max_new_tokens")
    for name in names:
        if getattr(options, name) not in (None, False):
            raise InputError(f"--{name}", f"is given, and {where} do not read it", "Leave it out.")


def _by_harness(names: Sequence[str], path: str, manager: Any, options: argparse.Namespace, settings: Any) -> list[Any]:
    from tulu_lightning.evaluation.harness import run_harness

    chat = options.lm_eval_chat
    found = run_harness(names, path, settings.engine, manager, limit=options.limit, seed=options.seed, chat=chat)
    for result in found:
        result.to_json(
            settings.out / result.model_digest[:12] / f"{result.task.replace(':', '_').replace('/', '_')}.json"
        )
    return found


def _without_devices(argv: Sequence[str]) -> list[str]:
    kept, skip = list[str](), False
    for word in argv:
        if skip:
            skip = False
        elif word == "--devices":
            skip = True
        elif not word.startswith("--devices="):
            kept.append(word)
    return kept


def _settings(options: argparse.Namespace) -> Any:
    from tulu_lightning.evaluation.command import Settings
    from tulu_lightning.rollout.engines import EngineSettings

    engine = EngineSettings(kind=options.engine, dtype=options.dtype)
    return Settings(Path(options.out), options.template, engine, options.seed)
