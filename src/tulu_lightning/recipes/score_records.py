"""The scores of a stage: at its start, at its end and in between, of one held-out set or of several tasks.

What `callbacks.evaluate` writes lies at `scores/<moment>.json`; results of further tasks lie one folder deeper, at
`scores/<moment>/<task>.json` or `scores/<task>/<moment>.json`. A moment is `before`, `after` or `step_<n>`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tulu_lightning.core.gain import Gain, Paired, gain
from tulu_lightning.evaluation.by_length import Answer
from tulu_lightning.recipes.reading import mapping, number, read_object, text

__all__ = ["MOMENT", "Sample", "Scores", "StageScores", "paired_gain", "read_stage_scores"]

MOMENT = re.compile(r"before|after|step_(\d+)")


class Sample(NamedTuple):
    """One held-out prompt and what was said to it."""

    prompt: str
    target: str
    response: str
    outcome: str
    score: float | None


class Scores(NamedTuple):
    """Mean score at one moment, with its interval (all three in [0, 1])."""

    accuracy: float
    low: float | None
    high: float | None
    n: int | None
    mean_tokens: float | None
    settings_hash: str
    """Prompts, sampling and verifier in one hash: two scores compare only where it is the same."""
    answers: tuple[Answer, ...] = ()
    """Length and score of each answer, in the order of the prompts; empty where the file does not hold them."""
    samples: tuple[Sample, ...] = ()
    """The answers themselves, in the same order; empty where the file does not hold them, or not all."""
    task: str = ""
    per_item: tuple[float, ...] = ()
    """Score of each item, for paired comparisons; empty where one is missing."""
    groups: tuple[str, ...] | None = None
    """The group of each item where the score is the mean of groups' means."""


class StageScores(NamedTuple):
    """All scores of one stage."""

    before: Scores | None = None
    """Of the held-out set, before the first step."""
    after: Scores | None = None
    between: tuple[tuple[int, Scores], ...] = ()
    """(finished steps, scores of the held-out set), in step order."""
    tasks: Mapping[str, Mapping[str, Scores]] = {}
    """By moment (`before`, `step_<n>`, `after`), then by task; the held-out set is not among them."""


def read_stage_scores(folder: Path, name: str, notes: list[str]) -> StageScores:
    """Reads `folder/scores`.

    Args:
        folder: of the stage.
        name: of the stage, for notes.
        notes: what could not be read is added, one sentence each.
    """
    held_out: dict[str, Scores] = {}
    tasks: dict[str, dict[str, Scores]] = {}
    root = folder / "scores"
    for path in sorted(root.rglob("*.json")) if root.is_dir() else ():
        parts = path.relative_to(root).with_suffix("").parts
        moments = [part for part in parts if MOMENT.fullmatch(part)]
        if len(moments) != 1 or len(parts) > 2:
            continue
        scores = read_scores(path, f"{name}/{path.relative_to(folder).as_posix()}", notes)
        if scores is None:
            continue
        if len(parts) == 1:
            held_out[moments[0]] = scores
        else:
            other = next(part for part in parts if part != moments[0])
            tasks.setdefault(moments[0], {})[scores.task or other] = scores
    between = [(int(found[1]), s) for when, s in held_out.items() if (found := MOMENT.fullmatch(when)) and found[1]]
    return StageScores(held_out.get("before"), held_out.get("after"), tuple(sorted(between, key=_step)), tasks)


def _step(pair: tuple[int, Scores]) -> int:
    return pair[0]


def read_scores(path: Path, label: str, notes: list[str]) -> Scores | None:
    """One file of scores; None, with a note where there is something to say, for one that holds none.

    Args:
        path: the file.
        label: its name in notes.
        notes: what could not be read is added.
    """
    value = read_object(path, label, notes)
    summary = mapping(value.get("summary")) if value else {}
    accuracy = number(summary.get("accuracy", summary.get("score")))
    if value is None or accuracy is None:
        return None
    n = number(summary.get("n"))
    interval = summary.get("interval")
    low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
    items = [mapping(item) for item in value["items"]] if isinstance(value.get("items"), list) else []
    per_item = tuple(score for item in items if (score := number(item.get("score"))) is not None)
    return Scores(
        accuracy=accuracy,
        low=number(low),
        high=number(high),
        n=None if n is None else int(n),
        mean_tokens=number(summary.get("mean_tokens")),
        settings_hash=text(value.get("settings")),
        answers=_answers(items, label, notes) if "accuracy" in summary else (),
        samples=_samples(items),
        task=text(value.get("task") or value.get("name")),
        per_item=per_item if len(per_item) == len(items) else (),
        groups=tuple(text(item.get("group")) for item in items) if value.get("average") == "macro" else None,
    )


def paired_gain(before: Scores, after: Scores) -> Gain | None:
    """The difference of two scores over the same items, with its 95% interval; None where they do not compare."""
    if (
        before.settings_hash != after.settings_hash
        or not before.per_item
        or len(before.per_item) != len(after.per_item)
    ):
        return None
    return gain(Paired(before.per_item, after.per_item, after.groups), 0.95)


def _answers(items: list[dict[str, Any]], label: str, notes: list[str]) -> tuple[Answer, ...]:
    """All answers or none: a part of them would pass for the whole."""
    answers = []
    for item in items:
        tokens, score = number(item.get("tokens")), number(item.get("score"))
        if tokens is None or tokens < 0 or score is None or not 0 <= score <= 1:
            notes.append(f"{label}: an answer in it has no length or no score, so none is shown by length.")
            return ()
        answers.append(Answer(int(tokens), score, item.get("finish") == "length"))
    return tuple(answers)


def _samples(items: list[dict[str, Any]]) -> tuple[Sample, ...]:
    """All or none: answers to held-out prompts, or the first answer to each item of a task."""
    found = [_of_task(item) if "answers" in item else _of_prompt(item) for item in items]
    return tuple(each for each in found if each is not None) if None not in found else ()


def _of_prompt(item: dict[str, Any]) -> Sample | None:
    if "prompt" not in item or "response" not in item:
        return None
    said = text(item["response"]), text(item.get("outcome")), number(item.get("score"))
    return Sample(text(item["prompt"]), text(item.get("target")), *said)


def _of_task(item: dict[str, Any]) -> Sample | None:
    """None for ranked choices, of which there are log-probs alone, and for results of older versions."""
    answers = item["answers"]
    first = mapping(answers[0]) if isinstance(answers, list) and answers else {}
    if "prompt" not in item or not number(first.get("tokens")):
        return None
    target = text(item.get("target"))
    told = "" if target.startswith("{") else target  # settings of a verifier are no answer to compare with
    return Sample(
        text(item["prompt"]), told, text(first.get("text")), text(first.get("outcome")), number(item.get("score"))
    )
