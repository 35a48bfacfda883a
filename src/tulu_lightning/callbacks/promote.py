"""When a checkpoint is offered for promotion, and what the run's closing record says."""

import contextlib
import json
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning as L

from tulu_lightning.callbacks.best import Best
from tulu_lightning.callbacks.evaluate import Evaluate
from tulu_lightning.callbacks.offer import Offer, decide, decision_of, record_of, write_card
from tulu_lightning.callbacks.records import Records
from tulu_lightning.callbacks.suite import step_moment
from tulu_lightning.checkpoints.export import export
from tulu_lightning.checkpoints.promoted import (
    export_folder,
    move,
    read_record,
    read_records,
    record_path,
    write_record,
)
from tulu_lightning.core.gain import Look
from tulu_lightning.core.promotion import Decision, PromotionRule
from tulu_lightning.core.settings import require
from tulu_lightning.errors import InputError, nearest
from tulu_lightning.files import write_whole

__all__ = ["Promote", "reset_peak_memory"]


class Promote(L.Callback):
    """After an evaluation: decide by the paired scores, export a Hugging Face folder, record it, and move `promoted`.

    Without an `Evaluate` callback there is nothing to decide by, and the final weights are promoted as they are; with
    one and no rule, a gain beyond chance is asked for. Scores that are missing or do not compare promote nothing. A gain is
    held against what `promoted` points at (the stage's start, as long as nothing of this run was promoted), a guard always
    against the start, so that small losses do not add up.
    Writes `summary.json`, the stage's closing record, last: a run that was killed before has none.

    Args:
        rule: what the paired differences of the scores must show.
        when: `last` decides once, after the last step; `each` after every evaluation but the first. Then `promoted` can
            move several times, and the looks share the rule's level.
        best: name of a validation metric, e.g. `val_accuracy`: promote the weights at which it was best, at the run's end,
            in place of the last ones. No test of chance is made.
        mode: whether the highest or the lowest value of `best` is the best.

    Raises:
        InputError: settings that clash.
    """

    def __init__(
        self,
        rule: PromotionRule | None = None,
        when: Literal["last", "each"] = "last",
        best: str | None = None,
        mode: Literal["max", "min"] = "max",
    ) -> None:
        super().__init__()
        for name, value, choices in (("when", when, ("last", "each")), ("mode", mode, ("max", "min"))):
            require(value in choices, f"Promote.{name}", repr(value), nearest(str(value), choices))
        clash = "A validation metric decides without a rule, at the end: leave out one of the two."
        require(best is None or (rule is None and when == "last"), "Promote.best", f"{best} beside rule or when", clash)
        require(best is not None or mode == "max", "Promote.mode", mode, "Without best nothing reads it: leave it out.")
        self.rule, self.when = rule, when
        self.best = None if best is None else Best(best, mode)

    # Before the run ---------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """A rule needs scores, and the closing record those of every step; find out before the run, not after.

        Raises:
            InputError: no `Records`, a rule without an `Evaluate`, an `Evaluate` that comes after this callback, a rule
                about tasks that it does not score, or `best` without validation rows.
        """
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        evaluate = self._evaluate(trainer)
        if not any(isinstance(c, Records) for c in callbacks):
            raise InputError("callbacks", "Promote is there, but there is no Records", "Add Records before Promote.")
        self.check(evaluate)
        if evaluate is not None and callbacks.index(evaluate) > callbacks.index(self):
            what = "Promote stands before Evaluate, so it would decide before the weights are scored"
            raise InputError("callbacks", what, "List Evaluate before Promote.")
        if self.best is not None and not getattr(trainer.datamodule, "validation", None):  # type: ignore[attr-defined]
            what = f"is {self.best.metric}, and there are no validation rows"
            raise InputError("Promote.best", what, "Give data.init_args.validation, or leave best out.")

    def check(self, evaluate: Evaluate | None) -> None:
        """Refuse what cannot be decided by the scores that there will be.

        Raises:
            InputError: see `setup`.
        """
        if evaluate is None:
            asks = "a rule" if self.rule is not None else "when: each" if self.when == "each" else ""
            if asks:
                remedy = "Add Evaluate before Promote."
                raise InputError("callbacks", f"Promote has {asks}, but there is no Evaluate", remedy)
            return
        if self.best is None:
            (self.rule or PromotionRule()).check(evaluate.names)
        if self.when == "each" and not evaluate.every_n_steps:
            remedy = "Set Evaluate.every_n_steps, or leave when at last."
            raise InputError("Promote.when", "is each, and Evaluate scores only before and after the run", remedy)

    def most_exports(self, pl_module: Any) -> int:
        """How many exports may lie in the run's folder together: of each evaluation, or of each best validation so far."""
        trainer, total = pl_module.trainer, pl_module.total_steps
        if self.best is not None:
            every = trainer.val_check_interval or total  # a share of the run where it is not a number of steps
            return 1 + (total // every if isinstance(every, int) else int(1 / every))
        every = getattr(self._evaluate(trainer), "every_n_steps", 0) if self.when == "each" else 0
        return -(-total // every) if every else 1

    @staticmethod
    def _evaluate(trainer: L.Trainer) -> Evaluate | None:
        return next((c for c in trainer.callbacks if isinstance(c, Evaluate)), None)  # type: ignore[attr-defined]

    # When -------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Count the looks; decide where a kill came between an evaluation and its decision.

        Raises:
            InputError: the rule plans fewer looks than there will be.
        """
        evaluate = self._evaluate(trainer)
        planned = self.rule.looks if self.rule is not None else None
        if planned is not None and planned < (count := len(self._looks(trainer, pl_module))):
            what = f"is {planned}, and this run has {count}"
            raise InputError("promotion.looks", what, "Leave it out, or give at least as many.")
        if trainer.is_global_zero and evaluate is not None and self.best is None:
            self._warn_of_few(evaluate)
        if self.best is not None:
            self.best.start(Path(trainer.default_root_dir))
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: object, **__: object) -> None:
        """Decide by what was scored after this step, if each evaluation has a say."""
        evaluate = self._evaluate(trainer)
        if self.when != "each" or evaluate is None or evaluate.latest is None or pl_module.step == 0:
            return
        step, moment = evaluate.latest
        if step == pl_module.step and moment != "after":
            self._offer(trainer, pl_module, moment)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep the weights if the metric is better than ever before."""
        if self.best is None or trainer.state.fn != "fit" or trainer.sanity_checking or pl_module.step == 0:
            return
        value = self.best.value_in(trainer.callback_metrics)
        if trainer.strategy.broadcast(self.best.improves(value, pl_module.step)):
            self._export(trainer, pl_module, step_moment(pl_module.step))
        if trainer.is_global_zero:
            self.best.keep(Path(trainer.default_root_dir), pl_module.step, value)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Export, decide, record, publish, close; nothing if the run was stopped before its end."""
        if not pl_module.finished:
            return
        run = Path(trainer.default_root_dir)
        if self.best is None:
            self._offer(trainer, pl_module, "after")
        elif trainer.is_global_zero:
            self._promote_best(trainer, pl_module)
        if trainer.is_global_zero:
            self._close(run, pl_module)

    def _warn_of_few(self, evaluate: Evaluate) -> None:
        """Say at once that a rule cannot pass."""
        rule, scores = self.rule or PromotionRule(), evaluate.scores.get("before", {})
        for task, _, _ in rule.roles(list(scores)) if scores else ():
            if task in scores and scores[task].n < rule.min_items:
                asked = f"{task} has {scores[task].n} items and the rule asks for {rule.min_items}"
                print(f"promotion: {asked} (min_items): nothing will be promoted", flush=True)

    def _looks(self, trainer: L.Trainer, pl_module: Any) -> list[int]:
        """The steps after which the run may be promoted."""
        evaluate, total = self._evaluate(trainer), min(pl_module.total_steps, int(trainer.num_training_batches))
        every = evaluate.every_n_steps if evaluate is not None and self.when == "each" else total
        return [*range(every, total, every), total] if every else [total]

    # What -------------------------------------------------------------------------------------------------------

    def _offer(self, trainer: L.Trainer, pl_module: Any, moment: str) -> None:
        """Decide on the present weights, once: a decision that is on disk stands."""
        run, step = Path(trainer.default_root_dir), pl_module.step
        decision = None
        if trainer.is_global_zero and not record_path(run, step).exists():
            decision = self._decide(trainer, pl_module, moment)
        decision = trainer.strategy.broadcast(decision)
        if decision is not None and (decision.promote or moment == "after"):
            self._export(trainer, pl_module, moment)
        if trainer.is_global_zero:
            self._settle(trainer, pl_module, Offer(step, moment, decision))

    def _decide(self, trainer: L.Trainer, pl_module: Any, moment: str) -> Decision:
        run, step, looks = Path(trainer.default_root_dir), pl_module.step, self._looks(trainer, pl_module)
        if self._evaluate(trainer) is None:
            return Decision(True, "no held-out scores to decide by", None, None, None)
        earlier = [record for record in read_records(run) if record["step"] < step]
        rule = self.rule or PromotionRule()
        number = sum(look < step for look in looks) + 1
        spent = sum(record["decision"]["level"] or 0.0 for record in earlier)
        return decide(rule, run, moment, Look(number, rule.looks or len(looks), spent), earlier)

    def _settle(self, trainer: L.Trainer, pl_module: Any, offer: Offer) -> None:
        """Record a decision, unless that was done before a kill, and do what it says."""
        run = Path(trainer.default_root_dir)
        path = record_path(run, offer.step)
        decided = offer.decision is None
        record = read_record(path) if decided else write_record(path, record_of(run, pl_module, offer))
        if record["decision"]["promote"]:
            move(run, record)
        which = f"step {offer.step} " if self.when == "each" or self.best is not None else ""
        said = "promoted" if record["decision"]["promote"] else "not promoted"
        print(f"{which}{said}: {record['decision']['reason']}", flush=True)

    @staticmethod
    def _export(trainer: L.Trainer, pl_module: Any, moment: str) -> None:
        """The present weights as a Hugging Face folder; gathering them is a collective."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        run = Path(trainer.default_root_dir)
        folder = export_folder(run, pl_module.step)
        about = lambda beside: write_card(beside, run, pl_module, moment)  # noqa: E731
        lm, stops = pl_module.model.lm, pl_module.stop_ids()
        export(lm, data.tokenizer, folder, data.template.jinja, stops, extra=about)

    def _promote_best(self, trainer: L.Trainer, pl_module: Any) -> None:
        assert self.best is not None
        run = Path(trainer.default_root_dir)
        found = self.best.found
        if found is None:
            decision = Decision(False, f"there was no validation, so {self.best.metric} has no best", None, None, None)
            step = pl_module.step
        else:
            decision, step = Decision(True, self.best.reason(), None, None, None), found[0]
        decided = record_path(run, step).exists()
        self._settle(trainer, pl_module, Offer(step, step_moment(step), None if decided else decision))
        self.best.drop_others(run)

    def _close(self, run: Path, stage: Any) -> None:
        records = read_records(run)
        promoted = [record for record in records if record["decision"]["promote"]]
        last = (promoted or records)[-1]
        decision = asdict(decision_of(last))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        folder = export_folder(run, stage.step)
        summary = {
            "stage": type(stage).__name__.lower(),
            "steps": stage.step,
            "seconds": sum(row["seconds"] for row in rows),
            "tokens": int(sum(row["tokens"] for row in rows)),
            "trained_tokens": int(sum(row["trained_tokens"] for row in rows)),
            "peak_memory_bytes": peak_memory_bytes(),
            "start": stage.start,
            "start_digest": stage.start_digest,
            "export": str(folder if folder.is_dir() else run / last["export"]),
            "promoted": bool(promoted),
            "promoted_step": promoted[-1]["step"] if promoted else None,
            "decision": decision,
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
