"""Says in the log when the numbers of a run begin to look wrong."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L

from tulu_lightning.callbacks.evaluate import Evaluate
from tulu_lightning.callbacks.suite import Scored, moments
from tulu_lightning.core.alerts import Alert, AlertLimits, Watcher

__all__ = ["Alerts"]


class Alerts(L.Callback):
    """One line for each alert of `core.alerts`, when it begins; TensorBoard has them as text.

    A resumed run reads its earlier steps and scores first, and says nothing again.

    Args:
        limits: when each rule speaks.
    """

    def __init__(self, limits: AlertLimits | None = None) -> None:
        super().__init__()
        self.limits = limits
        self.watcher = Watcher(limits)
        self._there: list[str] = []  # moments that were scored before this start, and told of
        self._started, self._scored = False, -1

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Look which scores there are, before any are made."""
        if trainer.is_global_zero:
            self._there = moments(Path(trainer.default_root_dir))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: object, **__: object) -> None:
        """Read what an earlier start of the run has recorded."""
        self._start(trainer, pl_module.step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: object, **__: object) -> None:
        """Read the step that just ended."""
        if trainer.is_global_zero:
            begun = self.watcher.add({**pl_module.metrics, "step": pl_module.step})
            self._tell(trainer, pl_module.step, begun + self._read_scores(trainer))

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Read the final scores."""
        self._start(trainer, pl_module.step)  # a run that was finished before has no batch
        if trainer.is_global_zero:
            self._tell(trainer, pl_module.step, self._read_scores(trainer))

    def _start(self, trainer: L.Trainer, step: int) -> None:
        """Read the steps and scores so far, in the order in which they came; tell of scores that this start has made."""
        if self._started or not trainer.is_global_zero:
            return
        self._started = True
        run, evaluate = Path(trainer.default_root_dir), self._evaluate(trainer)
        scores = [] if evaluate is None else evaluate.until(run, step)
        for row in _recorded(run, step):
            while scores and scores[0][0] < row["step"]:
                self._catch_up(trainer, *scores.pop(0))
            self.watcher.add(row)
        for one in scores:
            self._catch_up(trainer, *one)

    def _catch_up(self, trainer: L.Trainer, step: int, moment: str, found: Mapping[str, Scored]) -> None:
        begun = self._add(step, found)
        if moment not in self._there:
            self._tell(trainer, step, begun)

    def _read_scores(self, trainer: L.Trainer) -> list[Alert]:
        """The scores that came since the last look."""
        evaluate = self._evaluate(trainer)
        if evaluate is None or evaluate.latest is None or evaluate.latest[0] <= self._scored:
            return []
        step, moment = evaluate.latest
        return self._add(step, evaluate.scores[moment])

    def _add(self, step: int, found: Mapping[str, Scored]) -> list[Alert]:
        self._scored = step
        return [alert for one in found.values() for alert in self.watcher.add_score(step, one.task, one.score)]

    @staticmethod
    def _evaluate(trainer: L.Trainer) -> Evaluate | None:
        return next((c for c in trainer.callbacks if isinstance(c, Evaluate)), None)  # type: ignore[attr-defined]

    @staticmethod
    def _tell(trainer: L.Trainer, step: int, begun: list[Alert]) -> None:
        for alert in begun:
            print(f"alert at step {step}: {alert.rule}: {alert.text}", flush=True)
            for logger in trainer.loggers:
                write = getattr(getattr(logger, "experiment", None), "add_text", None)
                if write is not None:
                    write("alerts", f"{alert.rule}: {alert.text}", step)


def _recorded(run: Path, step: int) -> list[dict[str, Any]]:
    """The metrics of the steps up to this one; a torn line is left out."""
    path, rows = run / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError, KeyError):
            if (row := json.loads(line))["step"] <= step:
                rows.append(row)
    return rows
