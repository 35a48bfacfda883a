"""Prompts with a verifiable answer, for PPO and for evaluation."""

import hashlib
from collections.abc import Sequence

import numpy as np

from tulu_lightning.core.step_plan import StepPlan
from tulu_lightning.data import chat
from tulu_lightning.data.base import StepData
from tulu_lightning.data.intake import Counts, LeftOut
from tulu_lightning.data.mixture import order, wanted
from tulu_lightning.data.readers import read_prompt
from tulu_lightning.data.rows import Mixed, SourceRows
from tulu_lightning.data.sources import Row, Source, Table
from tulu_lightning.types import Check, Prompt, PromptBatch
from tulu_lightning.verifiers.registry import check_target

__all__ = ["PromptData"]


class PromptData(StepData[Prompt]):
    """Rows with `messages` (ending with a user turn), `ground_truth` and `verifier`.

    Every rank gets all prompts of a step and takes its share itself. `max_tokens` limits the prompt, not the response.
    Prompts are tokenised at every start: they are few and short beside the responses.
    """

    def _prepare(self, source: Source, table: Table) -> SourceRows:
        total = len(table)
        counts, prompts = Counts(rows=total), []
        enough = wanted(source, total)
        for index in order(source, total, self.seed):
            outcomes = self._encode(source, [table.number(index)], table.take([index]))
            prompts += [prompt for _, prompt in counts.take(outcomes, enough)]
            if counts.kept == enough:
                break
        digest = hashlib.sha256()
        for prompt in prompts:
            digest.update(repr(prompt).encode("utf-8", "surrogatepass"))
        lengths = np.fromiter((len(prompt.ids) for prompt in prompts), np.int64, len(prompts))
        none = np.zeros(len(prompts), np.int64)
        return SourceRows(source.name, prompts, lengths, none, counts, digest.hexdigest(), table.fingerprint)

    def _encode(self, source: Source, numbers: Sequence[int], rows: Sequence[Row]) -> list[Prompt | LeftOut]:
        return [self._prompt(source, number, row) for number, row in zip(numbers, rows, strict=True)]

    def _prompt(self, source: Source, number: int, row: Row) -> Prompt | LeftOut:
        messages, target, verifier = read_prompt(source, number, row, check_target)
        ids, _ = chat.encode(self.tokenizer, self.template, messages, generation_prompt=True)
        if reason := self._too_long(source, number, len(ids)):
            return reason
        return Prompt(tuple(ids), (Check(verifier, target),), messages[-1]["content"], row=-1, source=source.name)

    def _collect(self, mixed: Mixed) -> list[Prompt]:
        return [prompt._replace(row=row) for row, prompt in enumerate(mixed)]

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """All prompts, in order of their rows."""
        self.setup()
        return tuple(self._items)

    def _step_batch(self, plan: StepPlan, step: int, rank: int) -> PromptBatch:
        return PromptBatch(step, tuple(self._items[row] for row in plan.examples(step)))
