"""AGIEval's English tests (Zhong et al. 2023) as `agi_eval_english:0shot_cot::tulu3` of OLMES: zero-shot chain of thought."""

from tulu_lightning.errors import InputError, nearest
from tulu_lightning.evaluation.letters import in_letters, options
from tulu_lightning.evaluation.rows import DataSet
from tulu_lightning.evaluation.task import Example, Row, Task, Turn

__all__ = ["AGIEVAL", "DATA", "SUBTASKS"]

SUBTASKS = ("lsat-ar", "lsat-lr", "lsat-rc", "logiqa-en", "sat-math", "sat-en", "aqua-rat", "gaokao-english")
"""The paper counts eight. The questions of sat-en are asked with their passages only."""
DATA = DataSet(
    name="agieval",
    elsewhere="Take data/v1_1 of github.com/ruixiangcui/AGIEval, and add the file's name to each row as subtask.",
)


def _example(row: Row, place: int) -> Example:
    subtask = row["subtask"]
    if subtask not in SUBTASKS:
        what = f"its subtask {subtask!r} is none of the English ones"
        raise InputError(f"data set {DATA.name}, row {place + 1}", what, nearest(str(subtask), SUBTASKS))
    passage = f"Passage: {row['passage']}\n" if row.get("passage") else ""
    choices = [choice[3:].strip() if choice.startswith("(") else choice for choice in row["options"]]
    asked = f"{passage}Question: {row['question']}\n{options(choices)}\n"
    return Example(f"agieval/{subtask}/{place}", (Turn("user", in_letters(asked)),), row["label"], subtask)


AGIEVAL = Task(
    name="agieval",
    version=1,
    skill="Reasoning",
    rows=DATA.read,
    example=_example,
    verifier="multiple_choice",
    metric="exact match of the letter, mean over tests",
    average="macro",
    cot=True,
    max_new_tokens=2048,
    source="Tülu 3, table 24: agi_eval_english:0shot_cot::tulu3",
)
