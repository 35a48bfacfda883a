"""The record of a run: one JSON line a step, the logger, the progress line, and rollouts for people to read."""

import html
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import lightning as L

from tulu_lightning.files import write_whole
from tulu_lightning.progress import Progress

__all__ = ["Records", "rollout_table"]

SHOWN = ("loss", "accuracy", "margin", "reward", "score", "kl", "length")
"""Metrics that the progress line shows, those that a stage has."""


class Records(L.Callback):
    """Write `metrics.jsonl` (and `rollouts.jsonl`) in the run folder, the Trainer's logger, and a progress line.

    `rollouts_per_step` rollouts of each step are kept, evenly spread; TensorBoard has them as a table (its Text tab).

    What a validation found goes to `validation.jsonl` and the logger, at the step after which it ran.

    A resumed run first drops the lines of steps that it is about to do again, so every step stands there once.
    """

    def __init__(self, rollouts_per_step: int = 8) -> None:
        super().__init__()
        self.rollouts_per_step = rollouts_per_step
        self._progress: Progress | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: object, **__: object) -> None:
        """Open the record before the first step; in on_train_start, another callback might still refuse the start."""
        if not trainer.is_global_zero or self._progress is not None:
            return
        folder = Path(trainer.default_root_dir)
        for name in ("metrics.jsonl", "rollouts.jsonl", "validation.jsonl"):
            _keep_before(folder / name, pl_module.step)
        label = type(pl_module).__name__
        self._progress = Progress(label, pl_module.total_steps, done=pl_module.step)
        self._progress.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: object, **__: object) -> None:
        """Record the step that just ended."""
        for logger in trainer.loggers:
            logger.log_metrics(pl_module.metrics, step=pl_module.step)
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        _append(folder / "metrics.jsonl", [{**_head(pl_module), **pl_module.metrics}])
        shown = pl_module.samples[:: max(1, len(pl_module.samples) // max(1, self.rollouts_per_step))]
        shown = shown[: self.rollouts_per_step]
        if shown:
            _append(folder / "rollouts.jsonl", [{**_head(pl_module), **row} for row in shown])
            _log_table(trainer, shown, pl_module.step)
        if self._progress is not None:
            note = "  ".join(f"{name} {pl_module.metrics[name]:.3g}" for name in SHOWN if name in pl_module.metrics)
            self._progress.update(pl_module.step, note)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Record a validation within a fit; `trainer.validate` returns what it finds."""
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
        if trainer.state.fn != "fit" or trainer.sanity_checking or not found:
            return
        for logger in trainer.loggers:
            logger.log_metrics(found, step=pl_module.step)
        if trainer.is_global_zero:
            _append(Path(trainer.default_root_dir) / "validation.jsonl", [{**_head(pl_module), **found}])

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Close the progress line."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Close it also when the run breaks off."""
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._progress = None


COLUMNS = ("source", "prompt", "response", "target", "outcome", "score", "reward", "advantage", "finish")
CELL = 400
"""Characters of a cell of the table of rollouts; the file has them whole."""


def _log_table(trainer: L.Trainer, rows: list[dict[str, Any]], step: int) -> None:
    """The rollouts as a table, for loggers that take text as TensorBoard does."""
    for logger in trainer.loggers:
        write = getattr(getattr(logger, "experiment", None), "add_text", None)
        if write is not None:
            write("rollouts", rollout_table(rows), step)


def rollout_table(rows: list[dict[str, Any]]) -> str:
    """Rollouts as a table in Markdown, long texts cut, and nothing in them that would be read as markup."""
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = "" if value is None else str(value)
    text = text if len(text) <= CELL else text[:CELL] + "…"
    text = html.escape(text.encode("utf-8", "replace").decode())
    return re.sub(r"([\\`*_|\[\]#~$])", r"\\\1", text).replace("\n", "<br>")


def _head(stage: Any) -> dict[str, Any]:
    return {"stage": type(stage).__name__.lower(), "step": stage.step, "time": time.time()}


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity as null: JSON has neither."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _keep_before(path: Path, step: int) -> None:
    """Keep the lines of the first `step` steps; a torn last line (a kill in the middle of writing) goes, too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    write_whole(path, "".join(kept))
