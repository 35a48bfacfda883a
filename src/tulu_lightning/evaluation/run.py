"""Running a task: ask, sample or rank, judge, and keep every item as it is finished, so that a run can go on."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tulu_lightning.core.step_plan import mix_seed
from tulu_lightning.evaluation.asking import Asker, answer_text
from tulu_lightning.evaluation.result import Answer, Item, TaskResult, pass_at_k
from tulu_lightning.evaluation.task import Example, Task
from tulu_lightning.rollout.engine import Engine, Progress
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.rollout.scoring import Job, PoolLimits, Scorer, response_text
from tulu_lightning.types import Completion, Sampling
from tulu_lightning.verifiers.registry import Verifiers

__all__ = ["Model", "Sheet", "finished", "head_of", "is_answered", "read_items", "run_task"]

CHUNK = 64
"""Answers, or texts that are ranked, between two writes: what a kill can cost. As many as our own engine decodes at once."""
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


class Sheet:
    """The finished items of a task on disk, one JSON line each; a half-written last line is dropped.

    Args:
        path: of the file; None keeps nothing.
        head: what the items belong to; a sheet with another head is begun anew.
    """

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        self._path = path
        self.items = {} if path is None else read_items(path, head)
        if path is not None:  # rewritten, so that half a line at its end does not spoil the next one
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}.tmp")
            kept = [head, *self.items.values()]
            beside.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in kept), encoding="utf-8")
            beside.replace(path)

    def add(self, items: Sequence[Item]) -> None:
        """Keep finished items."""
        self.items.update({item["key"]: item for item in items})
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def read_items(path: Path, head: dict[str, Any]) -> dict[str, Item]:
    """The finished items of a sheet by key; none where it is not there, or belongs to something else."""
    lines: list[Any] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                lines.append(json.loads(line))
    return {item["key"]: item for item in lines[1:]} if lines and lines[0] == head else {}


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
    missing = [example for example in examples if not is_answered(example, done.items)]
    size = _chunk(task, examples, model)
    told = (lambda done, total: None) if progress is None else progress
    told(len(examples) - len(missing), len(examples))
    with Scorer(Verifiers({} if task.own is None else {task.verifier: task.own}), _limits(task)) as scorer:
        for at in range(0, len(missing), size):
            part, before = missing[at : at + size], len(examples) - len(missing) + at

            def within(rows: int, all_rows: int, before: int = before) -> None:
                answered = min(rows, all_rows - 1) // task.samples  # the last one counts when all are judged and kept
                told(before + answered, len(examples))

            ranked = bool(part[0].choices)
            done.add(
                _ranked(task, part, model, scorer) if ranked else _sampled(task, part, model, scorer, seed, within)
            )
            told(before + len(part), len(examples))
    items = [done.items[example.key] for example in examples]
    named = model.asker.template
    template = "" if not task.chat else "model" if named is None else named.name
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


def is_answered(example: Example, items: Mapping[str, Item]) -> bool:
    """Whether an item of its key is there, and of the same question."""
    item = items.get(example.key)
    return item is not None and item.get("asked") == example.digest()


def _chunk(task: Task, examples: Sequence[Example], model: Model) -> int:
    """Examples between two writes."""
    each = max((len(example.choices) for example in examples), default=0) or task.samples
    return max(1, (CHUNK if isinstance(model.engine, LocalEngine) else SERVED) // each)


def finished(task: Task, items: Sequence[Item]) -> tuple[Item, ...]:
    """All items of a task with their final scores, which may hang on all answers (`Task.finish`)."""
    return tuple(items if task.finish is None else task.finish(items))


def _limits(task: Task) -> PoolLimits:
    """The scoring pool's, wide enough for a judge that has limits of its own (`Code`)."""
    usual = PoolLimits()
    seconds, memory = (getattr(task.own, name, 0) for name in ("seconds", "memory_mb"))
    return PoolLimits(seconds=max(usual.seconds, 1.5 * seconds), memory_mb=max(usual.memory_mb, memory))


def _key(example: Example) -> int:
    return int.from_bytes(hashlib.sha256(example.key.encode()).digest()[:6], "big")


def _sampled(
    task: Task, examples: Sequence[Example], model: Model, scorer: Scorer, seed: int, within: Progress
) -> list[Item]:
    sampling = Sampling(task.max_new_tokens, task.temperature, model.stop_ids, task.top_p)
    prompts = model.asker.prompts(task, examples)
    keys = [_key(example) for example in examples]
    groups = model.engine.generate(prompts, task.samples, sampling, mix_seed(seed), keys=keys, progress=within)
    texts = [[_text(task, example, c, model) for c in group] for example, group in zip(examples, groups, strict=True)]
    jobs = [
        Job(task.verifier, text, example.target) for example, each in zip(examples, texts, strict=True) for text in each
    ]
    verdicts = iter(scorer.verdicts(jobs))
    items = []
    for example, group, each in zip(examples, groups, texts, strict=True):
        answers = [
            Answer(text=text, outcome=v.outcome, score=v.score, tokens=len(c.ids_L), finish=c.finish)
            for c, text, v in zip(group, each, verdicts, strict=False)  # verdicts go on
        ]
        items.append(_item(example, _score(task, answers), answers))
    return items


def _text(task: Task, example: Example, completion: Completion, model: Model) -> str:
    return answer_text(response_text(completion, model.asker.tokenizer), example.prefix, task.stops)


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
