"""GPQA (Rein et al. 2023) as `gpqa:0shot_cot::tulu3` of OLMES: zero-shot chain of thought, the 448 questions of its main set.

The options stand in an order that is drawn for each question, the same in every run.
"""

import random

from tulu_lightning.evaluation.letters import in_letters, options
from tulu_lightning.evaluation.rows import DataSet
from tulu_lightning.evaluation.task import Example, Row, Task, Turn

__all__ = ["DATA", "GPQA"]

DATA = DataSet(name="gpqa", hub="Idavidrein/gpqa", configs=("gpqa_main",), split="train", count=448)
WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def _example(row: Row, place: int) -> Example:
    right = row["Correct Answer"].strip()
    choices = [*(row[name].strip() for name in WRONG), right]
    order = list(range(4))
    random.Random(place).shuffle(order)
    letter = "ABCD"[order.index(3)]
    asked = f"Question: {row['Question'].strip()}\nChoices:\n{options([choices[i] for i in order])}\n\n"
    return Example(f"gpqa/{place}", (Turn("user", in_letters(asked, "(A), (B), (C), (D)")),), letter)


GPQA = Task(
    name="gpqa",
    version=1,
    skill="Knowledge",
    rows=DATA.read,
    example=_example,
    verifier="multiple_choice",
    metric="exact match of the letter",
    cot=True,
    max_new_tokens=2048,
    source="Tülu 3, table 24: gpqa:0shot_cot::tulu3",
)
