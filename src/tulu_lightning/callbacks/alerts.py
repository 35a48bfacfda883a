"""Says in the log when the numbers of a run begin to look wrong."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L

from tulu_lightning.callbacks.evaluate import Evaluate
from tulu_lightning.core.alerts import Alert, AlertLimits, Watcher

__all__ = ["Alerts"]


class Alerts(L.Callback):
    """One line for each alert of `core.alerts`, when it begins; TensorBoard has them as text.

    A resumed run reads its earlier steps first, and says nothing again.

    Args:
        limits: when each rule speaks.
    """

    def __init__(self, limits: AlertLimits | None = None) -> None:
        super().__init__()
        self.limits = limits
        self.watcher = Watcher(limits)
        self._started, self._scored = False, -1

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: object, **__: object) -> None:
        """Read what an earlier start of the run has recorded."""
        if self._started or not trainer.is_global_zero:
            return
        self._started = True
        path = Path(trainer.default_root_dir, "metrics.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with suppress(ValueError, KeyError):
                if (row := json.loads(line))["step"] <= pl_module.step:
                    self.watcher.add(row)
        self._read_scores(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: object, **__: object) -> None:
        """Read the step that just ended."""
        if trainer.is_global_zero:
            begun = self.watcher.add({**pl_module.metrics, "step": pl_module.step})
            self._tell(trainer, pl_module.step, begun + self._read_scores(trainer))

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Read the final scores."""
        if trainer.is_global_zero:
            self._tell(trainer, pl_module.step, self._read_scores(trainer))

    def _read_scores(self, trainer: L.Trainer) -> list[Alert]:
        """The scores that came since the last look."""
        evaluate: Any = next((c for c in trainer.callbacks if isinstance(c, Evaluate)), None)  # type: ignore[attr-defined]
        if evaluate is None or evaluate.latest is None or evaluate.latest[0] <= self._scored:
            return []
        step, moment = evaluate.latest
        self._scored = step
        found = evaluate.scores[moment].values()
        return [alert for one in found for alert in self.watcher.add_score(step, one.task, one.score)]

    @staticmethod
    def _tell(trainer: L.Trainer, step: int, begun: list[Alert]) -> None:
        for alert in begun:
            print(f"alert at step {step}: {alert.rule}: {alert.text}", flush=True)
            for logger in trainer.loggers:
                write = getattr(getattr(logger, "experiment", None), "add_text", None)
                if write is not None:
                    write("alerts", f"{alert.rule}: {alert.text}", step)
