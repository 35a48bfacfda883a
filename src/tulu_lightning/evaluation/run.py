"""Running a task: ask, sample or rank, judge, and keep every item as it is finished, so that a run can go on."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tulu_lightning.core.step_plan import mix_seed
from tulu_lightning.evaluation.asking import Asker, answer_text
from tulu_lightning.evaluation.result import Answer, Item, TaskResult, pass_at_k
from tulu_lightning.evaluation.sheet import Sheet, Text, is_answered
from tulu_lightning.evaluation.task import Example, Task, digest_of
from tulu_lightning.rollout.engine import Engine, Progress
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.rollout.scoring import Job, PoolLimits, Scorer, response_text
from tulu_lightning.rollout.stop_texts import StopTexts
from tulu_lightning.types import Completion, Sampling
from tulu_lightning.verifiers.registry import Verifiers

__all__ = ["Model", "finished", "head_of", "judge_rest", "run_task"]

CHUNK = 64
"""Answers that are sampled together, and judged when all are there; of texts that are ranked, what a kill can cost. As many
as our own engine decodes at once."""
SERVED = 512
"""Of an engine that has others beside it on its device, and is slow where it has too little to do: vLLM."""
SHOWN = 2000
"""Characters of a prompt that its item keeps."""


class Model(NamedTuple):
    """What is evaluated."""

    name: str
    digest: str
    """Hash of its weights."""
    engine: Engine
    asker: Asker
    stop_ids: tuple[int, ...]
    manner: tuple[str, ...] = ()
    """What else decides its answers: the kind of engine, its dtype."""


def run_task(
    task: Task,
    examples: Sequence[Example],
    model: Model,
    sheet: Path | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    *,
    whole: Sequence[Example] | None = None,
) -> TaskResult:
    """Score a model on a task.

    The answers to an example depend on the weights, the seed and the example's key, not on which others are asked
    beside it, so a run that goes on ends as one that was never stopped.

    Args:
        task: the task.
        examples: of the task.
        model: what is evaluated.
        sheet: file of finished items; a run that finds them there goes on after them.
        seed: of the samples.
        progress: called with (finished, all) examples.
        whole: what the examples are a rank's share of. The settings are the whole's then, and whoever puts the shares together
            calls `finished`.

    Raises:
        InputError: the model has no chat template, or a prompt does not fit it.
        EngineError: the engine died; finished items are kept.
    """
    settings = task.settings(examples if whole is None else whole)
    done = Sheet(sheet, head_of(task, model, seed))
    judge_rest(task, examples, done)
    missing = [example for example in examples if not is_answered(example, done.items)]
    size = _chunk(task, examples, model)
    told = (lambda done, total: None) if progress is None else progress
    told(len(examples) - len(missing), len(examples))
    with _scorer(task) as scorer:
        for at in range(0, len(missing), size):
            part, before = missing[at : at + size], len(examples) - len(missing) + at

            def within(rows: int, all_rows: int, before: int = before) -> None:
                answered = min(rows, all_rows - 1) // task.samples  # the last one counts when all are judged and kept
                told(before + answered, len(examples))

            ranked = bool(part[0].choices)
            if ranked:
                done.add(_ranked(task, part, model, scorer))
            else:
                _sampled(task, part, model, scorer, seed, done, within)
            told(before + len(part), len(examples))
    items = [done.items[example.key] for example in examples]
    named = model.asker.template
    template = "" if not task.chat else "model" if named is None else named.name
    if model.manner:  # a training run has one manner and one template, so its tasks' settings are all there is
        settings = digest_of([settings, template, list(model.manner), seed])
    return TaskResult(
        task=task.name,
        version=task.version,
        settings=settings,
        metric=task.metric,
        average=task.average,
        model=model.name,
        model_digest=model.digest,
        template=template,
        items=finished(task, items) if whole is None else tuple(items),
    )


def judge_rest(task: Task, examples: Sequence[Example], sheet: Sheet) -> None:
    """Judge what a run that was stopped had got answers to."""
    left = [(example, texts) for example in examples if (texts := sheet.texts(example)) is not None]
    left = [(example, texts) for example, texts in left if not is_answered(example, sheet.items)]
    if left:
        with _scorer(task) as scorer:
            _judged(task, [example for example, _ in left], [texts for _, texts in left], scorer, sheet)


def head_of(task: Task, model: Model, seed: int) -> dict[str, Any]:
    """What finished items belong to: all that decides an answer but the example, so that runs of other limits share them."""
    return {
        "task": task.name,
        "manner": json.loads(json.dumps(task.manner())),
        "model": model.digest,
        "words": model.asker.digest(task.chat),
        "stops": list(model.stop_ids),
        "engine": list(model.manner),
        "seed": seed,
    }


def _chunk(task: Task, examples: Sequence[Example], model: Model) -> int:
    """Examples between two writes."""
    each = max((len(example.choices) for example in examples), default=0) or task.samples
    return max(1, (CHUNK if isinstance(model.engine, LocalEngine) else SERVED) // each)


def finished(task: Task, items: Sequence[Item]) -> tuple[Item, ...]:
    """All items of a task with their final scores, which may hang on all answers (`Task.finish`)."""
    return tuple(items if task.finish is None else task.finish(items))


def _scorer(task: Task) -> Scorer:
    return Scorer(Verifiers({} if task.own is None else {task.verifier: task.own}), _limits(task))


def _limits(task: Task) -> PoolLimits:
    """The scoring pool's, wide enough for a judge that has limits of its own (`Code`)."""
    usual = PoolLimits()
    seconds, memory = (getattr(task.own, name, 0) for name in ("seconds", "memory_mb"))
    return PoolLimits(seconds=max(usual.seconds, 1.5 * seconds), memory_mb=max(usual.memory_mb, memory))


def _key(example: Example) -> int:
    return int.from_bytes(hashlib.sha256(example.key.encode()).digest()[:6], "big")


def _sampled(
    task: Task, examples: Sequence[Example], model: Model, scorer: Scorer, seed: int, sheet: Sheet, within: Progress
) -> None:
    """Items of examples that are answered in words; each answer is kept as soon as the engine has it."""
    sampling = Sampling(task.max_new_tokens, task.temperature, model.stop_ids, task.top_p)
    prompts = model.asker.prompts(task, examples)
    keys = [_key(example) for example in examples]

    def made(place: int, group: Sequence[Completion]) -> None:
        example = examples[place]
        words = [answer_text(response_text(c, model.asker.tokenizer), example.prefix, task.stops) for c in group]
        said = [Text(text=text, tokens=len(c.ids_L), finish=c.finish) for text, c in zip(words, group, strict=True)]
        sheet.hold(example, said)

    stops = StopTexts(task.stops, model.asker.tokenizer) if task.stops else None
    model.engine.generate(
        prompts, task.samples, sampling, mix_seed(seed), keys=keys, progress=within, made=made, stop_texts=stops
    )
    _judged(task, examples, [sheet.texts(example) or [] for example in examples], scorer, sheet)


def _judged(
    task: Task, examples: Sequence[Example], said: Sequence[Sequence[Text]], scorer: Scorer, sheet: Sheet
) -> None:
    """Judge what was answered to each example; an item is kept as soon as its last verdict is there: judges cost money."""
    owners = [(i, j) for i, texts in enumerate(said) for j in range(len(texts))]
    found: list[dict[int, Answer]] = [{} for _ in said]
    jobs = [Job(task.verifier, said[i][j]["text"], examples[i].target) for i, j in owners]
    for at, verdict in scorer.each(jobs):
        i, j = owners[at]
        text = said[i][j]
        found[i][j] = Answer(
            text=text["text"],
            outcome=verdict.outcome,
            score=verdict.score,
            tokens=text["tokens"],
            finish=text["finish"],
        )
        if len(found[i]) == len(said[i]):
            answers = [found[i][place] for place in range(len(said[i]))]
            sheet.add([_item(examples[i], _score(task, answers), answers)])


def _score(task: Task, answers: Sequence[Answer]) -> float:
    if task.samples == 1:
        return answers[0]["score"]
    return pass_at_k(sum(answer["outcome"] == "right" for answer in answers), task.samples, task.k)


def _ranked(task: Task, examples: Sequence[Example], model: Model, scorer: Scorer) -> list[Item]:
    """Items of examples with choices: the judge reads the choices' log-probs, as a JSON list."""
    asked = [pair for example in examples for pair in model.asker.pairs(task, example)]
    logps = iter(model.engine.logprobs(asked))
    items = []
    for example in examples:
        sums = [float(next(logps).sum()) for _ in example.choices]
        text = json.dumps([round(value, 6) for value in sums])
        verdict = scorer.verdicts([Job(task.verifier, text, example.target)])[0]
        answer = Answer(text=text, outcome=verdict.outcome, score=verdict.score, tokens=0, finish="stop")
        items.append(_item(example, verdict.score, [answer]))
    return items


def _item(example: Example, score: float, answers: list[Answer]) -> Item:
    return Item(
        key=example.key,
        group=example.group,
        target=example.target,
        score=score,
        answers=answers,
        asked=example.digest(),
        prompt=_shown(example.turns[-1].content + example.prefix),
    )


def _shown(text: str) -> str:
    """The end of a prompt, where the question is: worked examples come before it."""
    return text if len(text) <= SHOWN else f"… {text[-SHOWN:]}"
