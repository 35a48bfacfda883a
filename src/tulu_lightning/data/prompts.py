"""Prompts with a verifiable answer, for PPO and for evaluation."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from tulu_lightning.core.step_plan import StepPlan
from tulu_lightning.data import chat
from tulu_lightning.data.base import Overflow, StepData
from tulu_lightning.data.intake import Counts, LeftOut
from tulu_lightning.data.mixture import order, wanted
from tulu_lightning.data.prompt_formats import ROUTES, PromptRow, Rules, read_prompt
from tulu_lightning.data.prompt_source import (
    FewShot,
    PassRate,
    PromptSource,
    check_settings,
    exemplars_of,
    prompt_source,
)
from tulu_lightning.data.rows import Mixed, SourceRows
from tulu_lightning.data.sources import Row, Source, Table
from tulu_lightning.errors import InputError
from tulu_lightning.types import Prompt, PromptBatch
from tulu_lightning.verifiers.registry import Verifier, Verifiers

__all__ = ["FewShot", "PassRate", "PromptData", "PromptSource"]

CHUNK = 1024
"""Rows that are tokenised in one call."""


class PromptData(StepData[Prompt]):
    """Rows with `messages` (ending with a user turn) and `ground_truth`, and what judges an answer: `read_prompt`.

    Every rank gets all prompts of a step and takes its share itself. `max_tokens` limits the prompt, not the response.
    Prompts are tokenised at every start: they are few and short beside the responses.

    Example:
        `PromptData(sources=[PromptSource("sums", path="sums.jsonl", verifier="last_number")],
        tokenizer="smollm2-135m-instruct", max_tokens=512, examples_per_step=32)`
    """

    verifiers: Verifiers
    """The package's and the run's own."""

    def __init__(
        self,
        *,
        sources: list[PromptSource],
        tokenizer: str,
        max_tokens: int,
        examples_per_step: int,
        template: str = "chatml",
        seed: int = 0,
        epochs: int = 1,
        max_steps: int | None = None,
        on_overflow: Overflow = "drop",
        max_dropped_share: float = 0.5,
        accept_changed_data: bool = False,
        verifiers: dict[str, Verifier] | None = None,
        routes: dict[str, str] | None = None,
    ) -> None:
        """Keep the settings; those not named here are as in `StepData`.

        Args:
            sources: the mixture; a plain `Source` will do where nothing of `PromptSource` is needed.
            tokenizer: as in `StepData`.
            max_tokens: longest prompt that is kept, in tokens, template included.
            examples_per_step: prompts of one step.
            template: as in `StepData`.
            seed: as in `StepData`.
            epochs: as in `StepData`.
            max_steps: as in `StepData`.
            on_overflow: as in `StepData`, without `truncate`.
            max_dropped_share: as in `StepData`.
            accept_changed_data: as in `StepData`.
            verifiers: own verifiers by name, as class_path and init_args, e.g. a judge with its rubric; they win over
                the package's.
            routes: verifier by `dataset` of a row, beside those of `ROUTES`.

        Raises:
            InputError: a route to a verifier that there is not, or anything that `StepData` refuses.
        """
        super().__init__(
            sources=[prompt_source(source) for source in sources],
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            examples_per_step=examples_per_step,
            template=template,
            seed=seed,
            epochs=epochs,
            max_steps=max_steps,
            on_overflow=on_overflow,
            max_dropped_share=max_dropped_share,
            accept_changed_data=accept_changed_data,
        )
        self.own_verifiers, self.own_routes = dict(verifiers or {}), dict(routes or {})
        self.routes = {**ROUTES, **self.own_routes}
        self.verifiers = Verifiers(self.own_verifiers)
        for dataset, name in (routes or {}).items():
            try:
                self.verifiers[name]
            except InputError as error:
                raise InputError(f"data.routes.{dataset}", error.what, error.remedy) from None
        self._rules = Rules(self.verifiers, self.routes, {})
        self._numbers: dict[int, int] = {}

    def _mix(self, sources: list[Source], where: str) -> Mixed:
        for source in sources:
            check_settings(_of(source), self.routes, self.verifiers)
        before = {source.name: exemplars_of(_of(source)) for source in sources}
        self._rules = self._rules._replace(exemplars=before)
        return super()._mix(sources, where)

    def _prepare(self, source: Source, table: Table) -> SourceRows:
        total = len(table)
        counts, prompts = Counts(rows=total), []
        tried, enough = order(source, total, self.seed), wanted(source, total)
        at = 0
        while at < len(tried) and counts.kept != enough:
            # Never more rows than may still be needed: what lies behind the last one is not looked at.
            indices = tried[at : at + (CHUNK if enough is None else min(CHUNK, enough - counts.kept))]
            at += len(indices)
            outcomes = self._encode(source, [table.number(index) for index in indices], table.take(indices))
            prompts += [prompt for _, prompt in counts.take(outcomes, enough)]
        lengths = np.fromiter((len(prompt.ids) for prompt in prompts), np.int64, len(prompts))
        none = np.zeros(len(prompts), np.int64)
        digest = _digest(prompts, self.own_verifiers)
        return SourceRows(source.name, prompts, lengths, none, counts, digest, table.fingerprint, table.repeating)

    def _encode(self, source: Source, numbers: Sequence[int], rows: Sequence[Row]) -> list[Prompt | LeftOut]:
        read = [self._read(_of(source), number, row) for number, row in zip(numbers, rows, strict=True)]
        conversations = [row.messages for row in read if isinstance(row, PromptRow)]
        encoded = iter(chat.encode_many(self.tokenizer, self.template, conversations, generation_prompt=True))
        return [
            row if isinstance(row, LeftOut) else self._prompt(source, number, row, next(encoded).ids)
            for number, row in zip(numbers, read, strict=True)
        ]

    def _read(self, source: PromptSource, number: int, row: Row) -> PromptRow | LeftOut:
        try:
            return read_prompt(source, number, row, self._rules)
        except LeftOut as reason:
            return reason.with_traceback(None)

    def _prompt(self, source: Source, number: int, row: PromptRow, ids: list[int]) -> Prompt | LeftOut:
        if reason := self._too_long(source, number, len(ids)):
            return reason
        return Prompt(self._shared(ids), row.checks, row.messages[-1]["content"], row=-1, source=row.dataset)

    def _shared(self, ids: list[int]) -> tuple[int, ...]:
        """The same ids, each number one object in all prompts: 8 bytes a token, not 36."""
        return tuple(map(self._numbers.setdefault, ids, ids))

    def _collect(self, mixed: Mixed) -> list[Prompt]:
        return [prompt._replace(row=row) for row, prompt in enumerate(mixed)]

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """All prompts, in order of their rows."""
        self.setup()
        return tuple(self._items)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest one, template included."""
        return max((len(prompt.ids) for prompt in self.prompts), default=0)

    def _token_settings(self) -> dict[str, Any]:
        own = {name: _described(verifier) for name, verifier in self.own_verifiers.items()}
        return {**super()._token_settings(), **({"verifiers": own} if own else {})}

    def _step_batch(self, plan: StepPlan, step: int, rank: int) -> PromptBatch:
        return PromptBatch(step, tuple(self._items[row] for row in plan.examples(step)))


def _of(source: Source) -> PromptSource:
    return cast(PromptSource, source)  # made one at the start


def _digest(prompts: Sequence[Prompt], own: Mapping[str, Verifier]) -> str:
    """Hash of prompts as token ids, of what judges their answers and of how the run's own verifiers are set."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(np.asarray(prompt.ids, "<i8").tobytes())
        digest.update(repr((prompt.checks, prompt.text, prompt.source)).encode("utf-8", "surrogatepass"))
    named = {check.verifier for prompt in prompts for check in prompt.checks}
    for name in sorted(named & own.keys()):
        digest.update(f"{name} {_described(own[name])}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _described(verifier: Verifier) -> str:
    """Class and settings of a verifier; fields that take no part in comparing two (an address, a time limit) do not."""
    kind: Any = type(verifier)
    if dataclasses.is_dataclass(verifier):
        settings = {each.name: getattr(verifier, each.name) for each in dataclasses.fields(verifier) if each.compare}
    else:
        settings = {name: value for name, value in vars(verifier).items() if not name.startswith("_")}
    return f"{kind.__module__}.{kind.__qualname__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"
