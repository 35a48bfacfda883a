"""HREF (Lyu et al. 2024): eleven kinds of instructions that people answered too, against Llama-3.1-405B-Instruct's answers.

Tülu 3 scores two kinds by the similarity of RoBERTa embeddings to a person's answer, two by a judge alone (Llama-3.1-70B-Instruct), and
seven by it with the person's answer in view. The score is wins and half of the ties among all instructions.
"""

import json

from tulu_lightning.errors import InputError, nearest
from tulu_lightning.evaluation.href_judge import METHODS, HrefJudge
from tulu_lightning.evaluation.rows import DataSet
from tulu_lightning.evaluation.task import Example, Row, Task, Turn

__all__ = ["DATA", "HREF"]

DATA = DataSet(name="href", hub="allenai/href", split="dev")


def _example(row: Row, place: int) -> Example:
    if row["category"] not in METHODS:
        what = f"there is no category {row['category']!r}"
        raise InputError(f"data set href, row {place + 1}", what, nearest(str(row["category"]), METHODS))
    target = {name: row[name] for name in ("instruction", "category", "reference")} | {"baseline": row["output"]}
    turns = (Turn("user", row["instruction"]),)
    return Example(f"href/{place}", turns, json.dumps(target, ensure_ascii=False), row["category"])


HREF = Task(
    name="href",
    version=1,
    skill="Chat",
    rows=DATA.read,
    example=_example,
    verifier="href_judge",
    own=HrefJudge(),
    metric="win rate",
    source="Tülu 3, table 24; github.com/allenai/href for the kinds and how each is judged",
)
