"""BIG-Bench Hard (Suzgun et al. 2022) as `bbh:cot-v1::tulu` of OLMES: three chains of thought as turns, 27 subtasks.

The shots are those of the BBH repository; they are read out of the package lm-eval, which has them one file a subtask.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.bbh_answer import BBHAnswer
from tulu_lightning.evaluation.rows import DataSet, package_file
from tulu_lightning.evaluation.shots import conversation
from tulu_lightning.evaluation.task import Example, Row, Task

__all__ = ["BBH", "DATA", "SUBTASKS", "Shots", "shots_of"]

SUBTASKS = (
    *("boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages"),
    *("formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects"),
    *("logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation"),
    *("multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table"),
    *("reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks"),
    *("sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects"),
    *("tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies"),
    "word_sorting",
)
PACKAGE = "lm-eval"
THINK = "Let's think step by step."


class Shots(NamedTuple):
    """What stands before a subtask's questions."""

    description: str
    pairs: Sequence[tuple[str, str]]
    """Question and chain of thought, as they are asked and answered."""


def _from_hub(row: Mapping[str, Any], subtask: str | None) -> Row:
    return row if subtask is None else {**row, "subtask": row.get("subtask") or subtask}


DATA = DataSet(name="bbh", hub="lukaemon/bbh", configs=SUBTASKS, from_hub=_from_hub, count=6511)


@cache
def shots_of(subtask: str) -> Shots:
    """Description and three shots of a subtask.

    Raises:
        InputError: the package that has them is not there.
    """
    import yaml

    path = package_file(PACKAGE, f"lm_eval/tasks/bbh/cot_fewshot/{subtask}.yaml")
    if path is None:
        what = f"the worked examples of {subtask} are not here"
        raise InputError("task bbh", what, f"They are in a package: pip install --no-deps {PACKAGE}==0.4.13.")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    samples = found["fewshot_config"]["samples"]
    pairs = [(_asked(one["input"]), one["target"].removeprefix(THINK).strip()) for one in samples]
    return Shots(found["description"].strip(), pairs)


def _asked(question: str) -> str:
    return f"Q: {question}\nA: {THINK}"


def _example(row: Row, place: int) -> Example:
    subtask = row["subtask"]
    description, pairs = shots_of(subtask)
    turns = conversation(_asked(row["input"]), pairs, description)
    return Example(f"bbh/{subtask}/{place}", turns, f"{subtask}: {row['target']}", subtask)


BBH = Task(
    name="bbh",
    version=1,
    skill="Reasoning",
    rows=DATA.read,
    example=_example,
    verifier="bbh_answer",
    own=BBHAnswer(),
    metric="exact match",
    shots=3,
    multi_turn=True,
    cot=True,
    max_new_tokens=512,
    source="Tülu 3, table 24: bbh:cot-v1::tulu",
)
