"""Stage after stage: each starts from the last promoted checkpoint, and the whole can be stopped and run again.

A stage is finished when its folder holds `summary.json`, which is written last. Everything else (a stage's place in
its own steps, half-made pairs) is that stage's business, so running the same command again goes on where it was.
"""

import gc
import importlib.metadata
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from tulu_lightning import __version__
from tulu_lightning.callbacks.promote import reset_peak_memory
from tulu_lightning.checkpoints.identity import weights_digest
from tulu_lightning.errors import InputError
from tulu_lightning.files import write_whole
from tulu_lightning.launch.fit import fit
from tulu_lightning.launch.preemption import preemptible
from tulu_lightning.launch.run_folder import ensure_writable
from tulu_lightning.recipes.check import check_fit, fill, require_plotly
from tulu_lightning.recipes.config import read_config
from tulu_lightning.recipes.pairs import PairsConfig, make_pairs
from tulu_lightning.recipes.report import write_report
from tulu_lightning.recipes.table import score_table

__all__ = ["RecipeConfig", "Step", "main", "run_recipe"]

PACKAGES = ("torch", "lightning", "transformers", "tokenizers", "jsonargparse", "numpy")


@dataclass(frozen=True)
class Step:
    """One step of a recipe: a training stage (`fit`) or on-policy pairs (`pairs`)."""

    name: str
    """Its folder in the run."""
    fit: str | None = None
    """Config of `tulu fit`, relative to the recipe's file."""
    pairs: str | None = None
    """Config of `tulu pairs`, relative to the recipe's file."""
    set: list[str] = field(default_factory=list)
    """`key=value` overrides; {run} and {seed} are filled in."""


@dataclass(frozen=True)
class RecipeConfig:
    """Run stage after stage, each from the last promoted checkpoint; run it again to go on."""

    name: str
    run: str
    """Run folder."""
    stages: list[Step]
    seed: int = 1
    on_reject: Literal["stop", "continue"] = "stop"
    """When a stage is not promoted: stop, or go on from the last checkpoint that was."""


class NotPromoted(InputError):
    """A stage was not promoted, and the recipe says to stop there."""


def main(argv: Sequence[str]) -> int:
    """`tulu recipe --config FILE`."""
    config, file = read_config(RecipeConfig, "tulu recipe", argv)
    try:
        with preemptible():
            report = run_recipe(config, file.parent if file else Path(), command="tulu recipe " + " ".join(argv))
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from where {config.run} is")
        raise
    except NotPromoted:
        _show(Path(config.run), Path(config.run, "report.html"))
        raise
    _show(Path(config.run), report)
    return 0


def _show(run: Path, report: Path) -> None:
    console = Console()
    console.print(score_table(run))
    console.print(f"report: {report}", soft_wrap=True)


def run_recipe(config: RecipeConfig, base: Path, command: str = "") -> Path:
    """Run every step that is not finished yet.

    Args:
        config: the recipe.
        base: folder that config paths are relative to.
        command: for the record.

    Returns:
        Path of the HTML report.

    Raises:
        InputError: a config is missing or bad, the run folder belongs to another recipe, or a finished stage had
            started from other weights than those it would start from now.
        NotPromoted: a stage was not promoted and `on_reject` is stop; the report is written all the same.
        KeyboardInterrupt: Ctrl-C, or as `Preempted` a scheduler's signal; a step in progress was finished and saved.
    """
    _check(config, base)
    run = Path(config.run)
    ensure_writable(run)
    _claim(run, config, command)
    start: str | None = None
    for step in config.stages:
        folder = run / step.name
        if not _finished(config, step):
            print(f"\n== {step.name}", flush=True)
            reset_peak_memory()
            _run_step(step, config, base, start)
            gc.collect()
        else:
            _check_start(folder, start)
            print(f"== {step.name}: finished before", flush=True)
        if step.fit:
            try:
                start = _next_start(folder, start, config)
            except NotPromoted:
                write_report(run)
                raise
    return write_report(run)


def _finished(config: RecipeConfig, step: Step) -> bool:
    return Path(config.run, step.name, "summary.json").exists()


def _check(config: RecipeConfig, base: Path) -> None:
    """Everything that can be known before the first stage runs for minutes."""
    names = [step.name for step in config.stages]
    for step in config.stages:
        where = _where(config, step)
        if names.count(step.name) > 1:
            raise InputError(where, "stands twice", "Give each stage a name of its own.")
        if (step.fit is None) == (step.pairs is None):
            raise InputError(where, "has neither or both of fit and pairs", "Give exactly one.")
        if not (base / (step.fit or step.pairs or "")).is_file():
            raise InputError(where, f"no such config: {base / (step.fit or step.pairs or '')}", "Correct the path.")
    start: str | None = None
    for step in config.stages:
        options = _options(step, config, start)
        if _finished(config, step):
            pass
        elif step.pairs:
            read_config(PairsConfig, "tulu pairs", ["--config", str(base / step.pairs), *options])
        elif step.fit:
            check_fit(_where(config, step), base / step.fit, options)
        if step.fit:
            start = str(Path(config.run, step.name, "promoted"))  # it need not be there yet: nothing is opened
    require_plotly()


def _where(config: RecipeConfig, step: Step) -> str:
    return f"recipe {config.name}, stage {step.name!r}"


def _claim(run: Path, config: RecipeConfig, command: str) -> None:
    """Write `recipe.json`, or check that the folder is this recipe's and note that it was started again."""
    path = run / "recipe.json"
    settings = json.loads(json.dumps(asdict(config)))
    this = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "versions": {"tulu_lightning": __version__, "python": platform.python_version(), **_versions()},
        "machine": {"cores": torch.get_num_threads(), "system": platform.platform()},
    }
    if path.exists():
        record = json.loads(path.read_text())
        before = record["settings"]
        changed = sorted(key for key in settings if settings[key] != before.get(key) and key != "on_reject")
        if changed:
            remedy = "Give another run folder (--run), or remove this one to start over."
            raise InputError(str(run), f"was started with another {', '.join(changed)}", remedy)
        if all(_finished(config, step) for step in config.stages):
            return  # this start will make nothing
    else:
        record = {
            "name": config.name,
            "created": this["time"],
            "stages": [step.name for step in config.stages],
            "versions": this["versions"],
            "machine": this["machine"],
            "seeds": {"seed": config.seed},
            "command": command,
            "settings": settings,
        }
    record["starts"] = [*record.get("starts", []), this]
    write_whole(path, json.dumps(record, indent=1))


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _options(step: Step, config: RecipeConfig, start: str | None) -> list[str]:
    """Options of the step's own command; `start` is the checkpoint that earlier stages left, if any did."""
    overrides = fill(_where(config, step), step.set, run=config.run, seed=config.seed)
    options = [f"--{item}" for item in overrides]
    folder = Path(config.run, step.name)
    if step.pairs:
        return [*options, f"--output={folder}", *([f"--generate.model={start}"] if start else [])]
    options += [f"--trainer.default_root_dir={folder}", f"--seed_everything={config.seed}"]
    return options + ([f"--model.init_args.backbone.path={start}"] if start else [])


def _run_step(step: Step, config: RecipeConfig, base: Path, start: str | None) -> None:
    options = _options(step, config, start)
    if step.pairs:
        settings, _ = read_config(PairsConfig, "tulu pairs", ["--config", str(base / step.pairs), *options])
        make_pairs(settings)
        return
    done: Any = fit(base / step.fit, options)  # type: ignore[operator]
    if done.stop_requested or not done.model.finished:  # asked in its last step, the stage is done but the recipe stops
        raise done.stopped()


def _check_start(folder: Path, start: str | None) -> None:
    """Refuse a finished stage whose start weights have been made anew since; the later stages would not follow on it."""
    summary = json.loads((folder / "summary.json").read_text())
    recorded = summary.get("start_digest")
    if start is None or recorded is None or not Path(start).is_dir():  # a folder of an older version has no digest
        return
    if weights_digest(Path(start)) != recorded:
        what = f"started from other weights than {start} holds now"
        raise InputError(str(folder), what, f"Remove {folder}, and run the same command again.")


def _next_start(folder: Path, start: str | None, config: RecipeConfig) -> str:
    summary = json.loads((folder / "summary.json").read_text())
    if summary["promoted"]:
        return str(folder / "promoted")
    if config.on_reject == "stop":
        remedy = "Change the stage and remove its folder, or set on_reject to continue."
        raise NotPromoted(str(folder), f"was not promoted: {summary['decision']['reason']}", remedy)
    # Named even after the first stage: the configs of later ones may name another model of their own.
    start = start or str(summary["start"])
    print(f"{folder.name} was not promoted; going on from {start}")
    return start
