"""MMLU-Pro (Wang et al. 2024) as `mmlu_pro:0shot_cot::tulu3` of OLMES: zero-shot chain of thought, up to ten options."""

from tulu_lightning.evaluation.letters import in_letters, options
from tulu_lightning.evaluation.rows import DataSet
from tulu_lightning.evaluation.task import Example, Row, Task, Turn

__all__ = ["DATA", "MMLU_PRO"]

DATA = DataSet(name="mmlu_pro", hub="TIGER-Lab/MMLU-Pro", count=12032)


def _example(row: Row, place: int) -> Example:
    text = in_letters(f"Question: {row['question']}\n{options(row['options'])}\n")
    return Example(f"mmlu_pro/{row['question_id']}", (Turn("user", text),), row["answer"], row["category"])


MMLU_PRO = Task(
    name="mmlu_pro",
    version=1,
    skill="Knowledge",
    rows=DATA.read,
    example=_example,
    verifier="multiple_choice",
    metric="exact match of the letter, mean over categories",
    average="macro",
    cot=True,
    max_new_tokens=2048,
    source="Tülu 3, table 24: mmlu_pro:0shot_cot::tulu3",
)
