"""The record of a run: one JSON line a step, the logger, the progress line, and rollouts for people to read."""

import json
import math
import time
from pathlib import Path
from typing import Any

import lightning as L

from tulu_lightning.files import write_whole
from tulu_lightning.progress import Progress

__all__ = ["Records"]

SHOWN = ("loss", "accuracy", "margin", "reward", "score", "kl", "length")
"""Metrics that the progress line shows, those that a stage has."""


class Records(L.Callback):
    """Write `metrics.jsonl` (and `rollouts.jsonl`) in the run folder, the Trainer's logger, and a progress line.

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
        if shown and self.rollouts_per_step:
            _append(folder / "rollouts.jsonl", [{**_head(pl_module), **row} for row in shown[: self.rollouts_per_step]])
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
