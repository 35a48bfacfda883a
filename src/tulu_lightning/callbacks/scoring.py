"""One evaluation of the weights in training: the items are dealt to the ranks, and the first one writes."""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tulu_lightning.data.chat import ChatTemplate
from tulu_lightning.evaluation.asking import Asker
from tulu_lightning.evaluation.heldout import HeldOut, Item, Scores
from tulu_lightning.evaluation.result import TaskResult
from tulu_lightning.evaluation.run import Model, finished, run_task
from tulu_lightning.evaluation.task import Example, Task
from tulu_lightning.progress import Progress
from tulu_lightning.rollout.engine import Engine
from tulu_lightning.rollout.scoring import Scorer
from tulu_lightning.rollout.together import ALONE, Together, in_order, share_of
from tulu_lightning.verifiers.registry import Verifiers

__all__ = ["Evaluation", "digest"]


def digest(engine: Engine) -> str:
    """Hash of the weights that an engine holds."""
    return hashlib.sha256(json.dumps(engine.fingerprint(), sort_keys=True).encode()).hexdigest()


@dataclass
class Evaluation:
    """What is asked, and by whom.

    Each rank has an engine of its own and answers its share; then all of them hold all results.
    """

    tokenizer: Any
    template: ChatTemplate
    stop_ids: tuple[int, ...]
    verifiers: Verifiers
    held_out: HeldOut | None
    tasks: Sequence[tuple[Task, Sequence[Example]]]
    together: Together = ALONE

    def score(self, engine: Engine, label: str, sheets: Path) -> list[Scores | TaskResult]:
        """The results, the held-out prompts first.

        Args:
            engine: this rank's, with the weights.
            label: for the progress line and the records.
            sheets: folder in which finished items are kept until the results are there, so that an evaluation which is
                killed goes on.

        Raises:
            RunStopped: another rank failed, or did not come.
        """
        model = Model(label, digest(engine), engine, Asker(self.tokenizer, self.template, label), self.stop_ids)
        results: list[Scores | TaskResult] = []
        if self.held_out is not None:
            results.append(self._held_out(self.held_out, model))
        for task, examples in self.tasks:
            sheet = sheets / f".{task.name}.rank{self.together.rank}.items.jsonl"
            results.append(self._task(task, examples, model, sheet, label))
        return results

    def _share(self, items: Sequence[Any]) -> list[Any]:
        return share_of(items, self.together.rank, self.together.ranks)

    def _shown(self, label: str, total: int) -> Progress:
        return Progress(label, total, stream=None if self.together.first else io.StringIO())  # one rank speaks for all

    def _gathered(self, call: Callable[[], Sequence[Any]], what: str) -> tuple[Any, ...]:
        own = self.together.run(call, what)
        return tuple(in_order(self.together.gather(own, what)))

    def _held_out(self, held_out: HeldOut, model: Model) -> Scores:
        engine, label = model.engine, model.name
        mine = replace(held_out, prompts=tuple(self._share(held_out.prompts)))

        def answer() -> Sequence[Item]:
            if not mine.prompts:
                return ()
            with self._shown(label, len(mine.prompts)) as progress, Scorer(self.verifiers) as scorer:
                told = lambda done, total: progress.update(done)  # noqa: E731
                return mine.evaluate(engine, self.tokenizer, progress=told, scorer=scorer).items

        items = self._gathered(answer, f"{label}: held-out answers")
        name, version, settings = held_out.name, held_out.version, held_out.settings
        return Scores(name, version, settings, engine.version, items, weights=model.digest)

    def _task(self, task: Task, examples: Sequence[Example], model: Model, sheet: Path, label: str) -> TaskResult:
        mine = self._share(examples)
        whole: list[TaskResult] = []

        def answer() -> Sequence[Any]:
            with self._shown(f"{label} {task.name}", len(mine)) as progress:
                told = lambda done, total: progress.update(done)  # noqa: E731
                whole.append(run_task(task, mine, model, sheet, progress=told, whole=examples))
            return whole[0].items

        items = self._gathered(answer, f"{label}: answers to {task.name}")
        return replace(whole[0], items=finished(task, items))
