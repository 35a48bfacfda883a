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
from tulu_lightning.errors import InputError
from tulu_lightning.launch.fit import fit
from tulu_lightning.launch.run_folder import ensure_writable
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


def main(argv: Sequence[str]) -> int:
    """`tulu recipe --config FILE`."""
    config, file = read_config(RecipeConfig, "tulu recipe", argv)
    try:
        report = run_recipe(config, file.parent if file else Path(), command="tulu recipe " + " ".join(argv))
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from where {config.run} is")
        raise
    console = Console()
    console.print(score_table(Path(config.run)))
    console.print(f"report: {report}", soft_wrap=True)
    return 0


def run_recipe(config: RecipeConfig, base: Path, command: str = "") -> Path:
    """Run every step that is not finished yet.

    Args:
        config: the recipe.
        base: folder that config paths are relative to.
        command: for the record.

    Returns:
        Path of the HTML report.

    Raises:
        InputError: a config is missing or bad, the run folder belongs to another recipe, or a stage was not promoted
            and `on_reject` is stop.
    """
    _check(config, base)
    run = Path(config.run)
    ensure_writable(run)
    _claim(run, config, command)
    start: str | None = None
    for step in config.stages:
        folder = run / step.name
        if not (folder / "summary.json").exists():
            print(f"\n== {step.name}", flush=True)
            reset_peak_memory()
            _run_step(step, config, base, start)
            gc.collect()
        else:
            print(f"== {step.name}: finished before", flush=True)
        if step.fit:
            start = _next_start(folder, start, config)
    return write_report(run)


def _check(config: RecipeConfig, base: Path) -> None:
    """Everything that can be known before the first stage runs for minutes."""
    names = [step.name for step in config.stages]
    for step in config.stages:
        where = f"recipe {config.name}, stage {step.name!r}"
        if names.count(step.name) > 1:
            raise InputError(where, "stands twice", "Give each stage a name of its own.")
        if (step.fit is None) == (step.pairs is None):
            raise InputError(where, "has neither or both of fit and pairs", "Give exactly one.")
        if not (base / (step.fit or step.pairs or "")).is_file():
            raise InputError(where, f"no such config: {base / (step.fit or step.pairs or '')}", "Correct the path.")


def _claim(run: Path, config: RecipeConfig, command: str) -> None:
    """Write `recipe.json`, or check that the folder is this recipe's."""
    path = run / "recipe.json"
    settings = json.loads(json.dumps(asdict(config)))
    if path.exists():
        before = json.loads(path.read_text())["settings"]
        changed = sorted(key for key in settings if settings[key] != before.get(key) and key != "on_reject")
        if changed:
            remedy = "Give another run folder (--run), or remove this one to start over."
            raise InputError(str(run), f"was started with another {', '.join(changed)}", remedy)
        return
    record = {
        "name": config.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "stages": [step.name for step in config.stages],
        "versions": {"tulu_lightning": __version__, "python": platform.python_version(), **_versions()},
        "machine": {"cores": torch.get_num_threads(), "system": platform.platform()},
        "seeds": {"seed": config.seed},
        "command": command,
        "settings": settings,
    }
    beside = path.with_name(".recipe.json.tmp")
    beside.write_text(json.dumps(record, indent=1))
    beside.replace(path)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _run_step(step: Step, config: RecipeConfig, base: Path, start: str | None) -> None:
    overrides = [item.format(run=config.run, seed=config.seed) for item in step.set]
    options = [f"--{item}" for item in overrides]
    folder = str(Path(config.run, step.name))
    if step.pairs:
        options += [f"--output={folder}"] + ([f"--model={start}"] if start else [])
        settings, _ = read_config(PairsConfig, "tulu pairs", ["--config", str(base / step.pairs), *options])
        make_pairs(settings)
        return
    options += [f"--trainer.default_root_dir={folder}", f"--seed_everything={config.seed}"]
    options += [f"--model.init_args.backbone.path={start}"] if start else []
    finished: Any = fit(base / step.fit, options)  # type: ignore[operator]
    if not finished.model.finished:
        raise KeyboardInterrupt


def _next_start(folder: Path, start: str | None, config: RecipeConfig) -> str | None:
    summary = json.loads((folder / "summary.json").read_text())
    if summary["promoted"]:
        return str(folder / "promoted")
    if config.on_reject == "stop":
        remedy = "Change the stage and remove its folder, or set on_reject to continue."
        raise InputError(str(folder), f"was not promoted: {summary['decision']['reason']}", remedy)
    print(f"{folder.name} was not promoted; going on from {start or 'the start weights'}")
    return start
