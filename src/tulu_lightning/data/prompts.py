"""Prompts with a verifiable answer, for PPO and for evaluation."""

from tulu_lightning.core.step_plan import StepPlan
from tulu_lightning.data import chat
from tulu_lightning.data.base import StepData
from tulu_lightning.data.readers import read_prompt
from tulu_lightning.data.sources import Row, Source
from tulu_lightning.types import Prompt, PromptBatch
from tulu_lightning.verifiers.registry import check_target

__all__ = ["PromptData"]


class PromptData(StepData[Prompt]):
    """Rows with `messages` (ending with a user turn), `ground_truth` and `verifier`.

    Every rank gets all prompts of a step and takes its share itself. `max_tokens` limits the prompt, not the response.
    """

    def _read(self, source: Source, number: int, row: Row) -> Prompt:
        messages, target, verifier = read_prompt(source, number, row, check_target)
        ids, _ = chat.encode(self.tokenizer, self.template, messages, generation_prompt=True)
        self._check_length(source, number, len(ids))
        return Prompt(tuple(ids), target, verifier, messages[-1]["content"], row=-1)

    def _finish(self, items: list[Prompt]) -> list[Prompt]:
        return [prompt._replace(row=row) for row, prompt in enumerate(items)]

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """All prompts, in order of their rows."""
        self.setup()
        return tuple(self._items)

    def _tokens(self, item: Prompt) -> int:
        return len(item.ids)

    def _step_batch(self, plan: StepPlan, step: int, rank: int) -> PromptBatch:
        return PromptBatch(step, tuple(self._items[row] for row in plan.examples(step)))
