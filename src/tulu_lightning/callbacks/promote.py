"""When a checkpoint is offered for promotion, and what the run's closing record says."""

import contextlib
import json
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L

from tulu_lightning.callbacks.evaluate import Evaluate
from tulu_lightning.callbacks.records import Records
from tulu_lightning.checkpoints.export import export, publish
from tulu_lightning.core.promotion import Decision, PromotionRule
from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.heldout import compare
from tulu_lightning.files import write_whole

__all__ = ["Promote"]


class Promote(L.Callback):
    """After the last step: export a Hugging Face folder, decide by the paired scores, and move `promoted`.

    Without an `Evaluate` callback there is nothing to decide by, and the final weights are promoted as they are; with
    one and no rule, a gain beyond chance is asked for. Scores that are missing or do not compare promote nothing.
    Writes `summary.json`, the stage's closing record, last: a run that was killed before has none.

    Args:
        rule: what the paired difference of the held-out scores must show.
    """

    def __init__(self, rule: PromotionRule | None = None) -> None:
        super().__init__()
        self.rule = rule

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """A rule needs scores, and the closing record those of every step; find out before the run, not after.

        Raises:
            InputError: no `Records`, a rule without an `Evaluate`, or an `Evaluate` that comes after this callback.
        """
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        evaluate = self._evaluate(trainer)
        if not any(isinstance(c, Records) for c in callbacks):
            raise InputError("callbacks", "Promote is there, but there is no Records", "Add Records before Promote.")
        if self.rule is not None and evaluate is None:
            raise InputError(
                "callbacks", "Promote has a rule, but there is no Evaluate", "Add Evaluate before Promote."
            )
        if evaluate is not None and callbacks.index(evaluate) > callbacks.index(self):
            what = "Promote stands before Evaluate, so it would decide before the final weights are scored"
            raise InputError("callbacks", what, "List Evaluate before Promote.")

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Export, decide, publish, record; nothing if the run was stopped before its end."""
        if not pl_module.finished:
            return
        run = Path(trainer.default_root_dir)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        folder = run / "exports" / f"step-{pl_module.step:06d}"
        export(pl_module.model.lm, data.tokenizer, folder, data.template.jinja, pl_module.stop_ids())
        if not trainer.is_global_zero:
            return
        decision = self._decide(trainer)
        if decision.promote:
            publish(folder, run / "promoted")
        print(f"{'promoted' if decision.promote else 'not promoted'}: {decision.reason}")
        self._record(run, pl_module, folder, decision)

    @staticmethod
    def _evaluate(trainer: L.Trainer) -> Evaluate | None:
        return next((c for c in trainer.callbacks if isinstance(c, Evaluate)), None)  # type: ignore[attr-defined]

    def _decide(self, trainer: L.Trainer) -> Decision:
        evaluate = self._evaluate(trainer)
        if evaluate is None:
            return Decision(True, "no held-out scores to decide by", None, None, None)
        if evaluate.before is None or evaluate.after is None:
            missing = "start" if evaluate.before is None else "final"
            return Decision(False, f"there are no held-out scores of the {missing} weights", None, None, None)
        try:
            compare(evaluate.before, evaluate.after)
        except InputError as error:
            return Decision(False, f"the held-out scores do not compare: {error.what}", None, None, None)
        return (self.rule or PromotionRule()).decide(evaluate.before.per_item, evaluate.after.per_item)

    def _record(self, run: Path, stage: Any, folder: Path, decision: Decision) -> None:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        summary = {
            "stage": type(stage).__name__.lower(),
            "steps": stage.step,
            "seconds": sum(row["seconds"] for row in rows),
            "tokens": int(sum(row["tokens"] for row in rows)),
            "trained_tokens": int(sum(row["trained_tokens"] for row in rows)),
            "peak_memory_bytes": peak_memory_bytes(),
            "start": stage.start,
            "start_digest": stage.start_digest,
            "export": str(folder),
            "promoted": decision.promote,
            "decision": asdict(decision),
        }
        write_whole(run / "summary.json", json.dumps(summary, indent=1))


def peak_memory_bytes() -> int:
    """Highest resident memory of this process so far, or since the last `reset_peak_memory`."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory() -> None:
    """Start the peak anew, so that stages in one process do not inherit each other's; only Linux can."""
    control = Path("/proc/self/clear_refs")
    with contextlib.suppress(OSError):
        control.write_text("5")
