"""When a run is scored: before its first step, after its last, and in between if asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from tulu_lightning.callbacks.scoring import Evaluation, digest
from tulu_lightning.callbacks.suite import (
    Scored,
    Suite,
    moments,
    read_moment,
    score_path,
    scored,
    step_moment,
    step_of,
)
from tulu_lightning.callbacks.undisturbed import undisturbed
from tulu_lightning.core.promotion import HELD_OUT
from tulu_lightning.core.settings import require
from tulu_lightning.data.prompts import PromptData, PromptSource
from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.asking import Asker
from tulu_lightning.evaluation.heldout import HeldOut, Scores
from tulu_lightning.evaluation.result import TaskResult
from tulu_lightning.evaluation.task import Example, Task
from tulu_lightning.models.limits import read_limits
from tulu_lightning.rollout.engine import Engine
from tulu_lightning.rollout.together import Together
from tulu_lightning.types import Prompt, Sampling
from tulu_lightning.verifiers.registry import Verifiers

__all__ = ["Evaluate"]

WAIT = 6 * 3600.0
"""Seconds that a rank waits for the others' answers, unless the strategy's own timeout is shorter."""


class Evaluate(L.Callback):
    """Scores the weights on held-out prompts, by greedy answers and their verifiers, and on tasks of `tulu eval`.

    Written to `scores/` (`callbacks.suite` says how) and, as `heldout_accuracy` and `eval/<task>`, to the Trainer's logger.
    Over several ranks each answers its share with a copy of the whole weights. Random state and batches of training are
    not touched.

    Args:
        sources: prompt rows (`messages`, `ground_truth`, `verifier`) that no training row repeats.
        max_new_tokens: cap of an answer to one of them.
        max_tokens: longest of these prompts, in tokens.
        every_n_steps: also score after so many steps each; 0 for only before and after.
        suite: tasks of `tulu eval`, and how many items of each.

    Raises:
        InputError: `every_n_steps` is below 0, or there is nothing to score.

    Attributes:
        latest: the step after which weights were scored last, and the moment's name; None before the first.
        scores: by moment, then by task; of this process.
    """

    latest: tuple[int, str] | None = None

    def __init__(
        self,
        sources: list[PromptSource] | None = None,
        max_new_tokens: int | None = None,
        max_tokens: int = 2048,
        every_n_steps: int = 0,
        suite: Suite | None = None,
    ) -> None:
        super().__init__()
        require(every_n_steps >= 0, "Evaluate.every_n_steps", every_n_steps, "Use 0 for only before and after the run.")
        require(
            sources is not None or suite is not None, "Evaluate", "given neither", "Give sources, a suite, or both."
        )
        unused = "Leave it out: without sources no prompt reads it. A suite has its own."
        require(sources is not None or max_new_tokens is None, "Evaluate.max_new_tokens", max_new_tokens, unused)
        missing = "Give the cap of an answer to a held-out prompt, in tokens."
        require(sources is None or (max_new_tokens or 0) >= 1, "Evaluate.max_new_tokens", max_new_tokens, missing)
        self.every_n_steps, self.suite = every_n_steps, suite
        self.sources, self.max_new_tokens, self.max_tokens = sources, max_new_tokens, max_tokens
        self.scores: dict[str, dict[str, Scored]] = {}
        self._prompts: tuple[Prompt, ...] = ()
        self._sampling = Sampling(max_new_tokens or 1, 0.0)
        self._tasks: list[tuple[Task, list[Example]]] = []
        self._verifiers = Verifiers()
        self._evaluation: Evaluation | None = None

    @property
    def names(self) -> list[str]:
        """What is scored: `held-out` and the suite's tasks.

        Raises:
            InputError: there is no such task.
        """
        held_out = [HELD_OUT] if self.sources is not None else []
        return held_out + ([] if self.suite is None else [task.name for task in self.suite.resolve()])

    # Before the run ---------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Read and check what is asked before any weights load.

        Raises:
            InputError: what is trained cannot answer, a data set is not there, or a prompt does not fit the model.
        """
        if not pl_module.speaks:
            what = f"Evaluate asks for answers, and {type(pl_module).__name__} trains a model that gives none"
            raise InputError("callbacks", what, "Leave Evaluate out; validation rows score a reward model.")
        if stage != "fit" or self._prompts or self._tasks:
            return
        if self.sources is not None:
            self._read_prompts(trainer, pl_module, self.sources)
        if self.suite is not None:
            with undisturbed():
                self._tasks = self.suite.read()
            self._check_lengths(trainer, pl_module)

    def _read_prompts(self, trainer: L.Trainer, pl_module: Any, sources: list[PromptSource]) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        prompts = PromptData(
            sources=sources,
            tokenizer=pl_module.folder,
            template=data.template.name,
            max_tokens=self.max_tokens,
            examples_per_step=1,
            on_overflow="error",
            verifiers=getattr(data, "own_verifiers", None),
            routes=getattr(data, "own_routes", None),
        )
        prompts.setup()
        self._verifiers, self._prompts = prompts.verifiers, prompts.prompts
        self._sampling = self._sampling._replace(stop_ids=prompts.stop_ids)

    def _check_lengths(self, trainer: L.Trainer, pl_module: Any) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        room = read_limits(pl_module.folder).positions
        asker = Asker(data.tokenizer, data.template, pl_module.start)
        for task, examples in self._tasks:
            asker.check_room(task, examples, room, "Set Evaluate.suite.max_new_tokens lower, or leave the task out.")

    # When -------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Score the start weights, once: a resumed run has the record already.

        Raises:
            InputError: a resumed run has the record, but of other prompts or another sampling.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._evaluation = Evaluation(
            tokenizer=data.tokenizer,
            template=data.template,
            stop_ids=pl_module.stop_ids(),
            verifiers=self._verifiers,
            held_out=None if self.sources is None else HeldOut(self._prompts, self._sampling),
            tasks=self._tasks,
            together=Together.of(trainer, WAIT),
        )
        run = Path(trainer.default_root_dir)
        # One rank looks, or a file system that is late would have some of them score and others not.
        here = self._kept(run, "before") if trainer.is_global_zero else ({}, "")
        kept, other = trainer.strategy.broadcast(here)
        if kept:
            self._take("before", 0, kept)
        elif pl_module.step == 0:
            self.score(trainer, pl_module, "before")
        elif other:
            what = f"its scores are of other held-out prompts or sampling, and training is at step {pl_module.step}"
            remedy = "Set Evaluate back to what it was at the start, or give another run folder."
            raise InputError(str(score_path(run, "before", other)), what, remedy)
        elif trainer.is_global_zero:
            path = run / "scores" / "before.json"
            print(f"no scores of the start weights in {path}: this run cannot show a gain, so it will not be promoted")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Score what a kill came before: the checkpoint of a step is saved before its weights are scored."""
        if self._due(pl_module):
            self.score(trainer, pl_module, step_moment(pl_module.step))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: object, **__: object) -> None:
        """Score the present weights if it is time to; the final ones are scored when the run has ended."""
        if self._due(pl_module):
            self.score(trainer, pl_module, step_moment(pl_module.step))

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Score the final weights, if the run came to its end."""
        if pl_module.finished:
            self.score(trainer, pl_module, "after")

    def _due(self, pl_module: Any) -> bool:
        n = self.every_n_steps
        return bool(n) and pl_module.step > 0 and pl_module.step % n == 0 and not pl_module.finished

    # What -------------------------------------------------------------------------------------------------------

    def score(self, trainer: L.Trainer, pl_module: Any, moment: str) -> None:
        """Score the present weights, on all ranks together; write and log what comes of it.

        Scores that an earlier start has made of the same weights, under the same settings, are read and not made again.
        """
        assert self._evaluation is not None
        run = Path(trainer.default_root_dir)
        with undisturbed():
            engine = pl_module.make_engine()
            try:
                found = trainer.strategy.broadcast(self._made(run, moment, engine) if trainer.is_global_zero else {})
                if not found:
                    label = f"{type(pl_module).__name__} {moment}"
                    results = self._evaluation.score(engine, label, run / "scores" / moment)
                    found = {one.task: one for one in map(scored, results)}
                    if trainer.is_global_zero:
                        self._write(run, moment, results)
            finally:
                engine.close()
        self._take(moment, pl_module.step, found)
        metrics = {"heldout_accuracy" if task == HELD_OUT else f"eval/{task}": one.score for task, one in found.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=pl_module.step)

    def _made(self, run: Path, moment: str, engine: Engine) -> dict[str, Scored]:
        """The scores of a moment that are on disk, if they are all there and of these weights."""
        kept, _ = self._kept(run, moment)
        weights = digest(engine) if kept else ""
        return kept if all(one.weights == weights for one in kept.values()) else {}

    @staticmethod
    def _write(run: Path, moment: str, results: Sequence[Scores | TaskResult]) -> None:
        for result in results:
            one = scored(result)
            result.to_json(score_path(run, moment, one.task))
            what = "accuracy" if one.task == HELD_OUT else one.task
            print(f"{moment}: {what} {one.score:.3f} [{one.low:.3f}, {one.high:.3f}], n = {one.n}", flush=True)
        for sheet in (run / "scores" / moment).glob(".*.items.jsonl"):
            sheet.unlink()

    def _take(self, moment: str, step: int, scores: dict[str, Scored]) -> None:
        self.latest, self.scores[moment] = (step, moment), scores

    def until(self, run: Path, step: int) -> list[tuple[int, str, dict[str, Scored]]]:
        """The scores up to a step as they came, also those of an earlier start of the run.

        Args:
            run: folder of the run.
            step: finished steps.

        Returns:
            Finished steps, the moment's name and the scores, by task. Scores of other prompts or another sampling than those
            asked for now are left out, and so is `after` unless this process has it.
        """
        found: list[tuple[int, str, dict[str, Scored]]] = []
        for moment in moments(run):
            place, here = step_of(moment, step), self.scores.get(moment)
            if place <= step and (moment != "after" or here):
                found.append((place, moment, here or self._kept(run, moment)[0]))
        return found

    def _kept(self, run: Path, moment: str) -> tuple[dict[str, Scored], str]:
        """The scores of a moment that are on disk, if they are all there and of what would be asked now.

        Returns:
            The scores, or nothing; and the first task whose scores are of something else.
        """
        assert self._evaluation is not None
        wanted = {task.name: task.settings(examples) for task, examples in self._tasks}
        if self._evaluation.held_out is not None:
            wanted[HELD_OUT] = self._evaluation.held_out.settings
        found = read_moment(run, moment)
        other = next((name for name, key in wanted.items() if name in found and found[name].settings != key), "")
        complete = not other and all(name in found for name in wanted)
        return ({name: found[name] for name in wanted} if complete else {}), other
