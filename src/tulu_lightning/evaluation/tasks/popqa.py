"""PopQA (Mallen et al. 2023) as `popqa::tulu` of OLMES: fifteen shots as turns, one of each other relation.

A question's shots are of the fifteen relations that are not its own, so none gives its kind of answer away. They are the
rows of the data set `popqa_shots` where the user gives one, else the first row of each relation.
"""

import json
from collections.abc import Mapping, Sequence

from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.contains import ContainsAny
from tulu_lightning.evaluation.rows import DataSet, is_given
from tulu_lightning.evaluation.shots import Shot, conversation
from tulu_lightning.evaluation.task import Example, Row, Task

__all__ = ["DATA", "POPQA", "RELATIONS"]

RELATIONS = (22, 218, 91, 257, 182, 164, 526, 97, 533, 639, 472, 106, 560, 484, 292, 422)
"""Wikidata's numbers of occupation, place of birth, genre, father, country, producer, director, capital of, screenwriter,
composer, colour, religion, sport, author, mother and capital, in the order of the paper's templates."""
DATA = DataSet(name="popqa", hub="akariasai/PopQA", count=14267)
SHOT_DATA = DataSet(name="popqa_shots", hub="akariasai/PopQA")


def _asked(question: str) -> str:
    return f"Q: {question} A:"


def _rows() -> Sequence[Row]:
    """The questions, each with the shots of all relations."""
    rows = DATA.read()
    pool = _pool(SHOT_DATA.read() if is_given(SHOT_DATA.name) else rows)
    return [{**row, "shots": pool} for row in rows]


def _pool(rows: Sequence[Row]) -> Mapping[int, Shot]:
    first: dict[int, Shot] = {}
    for row in rows:
        first.setdefault(int(row["prop_id"]), (_asked(row["question"]), row["obj"]))
    missing = [str(relation) for relation in RELATIONS if relation not in first]
    if missing:
        what = f"no row is of relation (prop_id) {', '.join(missing)}, and a shot of each of the 16 is needed"
        remedy = f"Give all of PopQA, or the shots apart: --data {SHOT_DATA.name}=FILE.jsonl."
        raise InputError(f"data set {DATA.name}", what, remedy)
    return {relation: first[relation] for relation in RELATIONS}


def _example(row: Row, place: int) -> Example:
    relation = int(row["prop_id"])
    shots = [shot for of, shot in row["shots"].items() if of != relation]
    return Example(f"popqa/{row['id']}", conversation(_asked(row["question"]), shots), _target(row), str(relation))


def _target(row: Row) -> str:
    aliases = row["possible_answers"]
    return aliases if isinstance(aliases, str) else json.dumps(aliases)


POPQA = Task(
    name="popqa",
    version=1,
    skill="Knowledge",
    rows=_rows,
    example=_example,
    verifier="contains_any",
    own=ContainsAny(),
    metric="an accepted name is in the answer",
    shots=15,
    multi_turn=True,
    max_new_tokens=15,
    stops=("\n\n",),
    source="Tülu 3, table 24: popqa::tulu",
)
