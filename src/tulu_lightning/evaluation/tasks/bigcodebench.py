"""BigCodeBench-Hard (Zhuo et al. 2024) as `bigcodebench_hard::tulu` of OLMES: instructions in words, pass@10, calibrated.

Its 148 programs use libraries, which have to be installed: without one of them no answer that uses it could pass.
"""

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.rows import DataSet
from tulu_lightning.evaluation.task import Example, Row, Task, Turn
from tulu_lightning.types import Verdict
from tulu_lightning.verifiers.code import Code, program_of

__all__ = ["BIGCODEBENCH_HARD", "DATA", "CalibratedCode"]

ASKED = "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
OPENING = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:\n"
    "```python\n"
)
RUN = """
import io as _io, unittest as _unittest
_found = _unittest.defaultTestLoader.loadTestsFromTestCase(TestCases)
_done = _unittest.TextTestRunner(stream=_io.StringIO()).run(_found)
assert _done.testsRun and _done.wasSuccessful()
"""
DATA = DataSet(name="bigcodebench_hard", hub="bigcode/bigcodebench-hard", split="v0.1.2", count=148)


@dataclass(frozen=True)
class CalibratedCode(Code):
    """As `Code`, with the prompt's imports and an empty function in front: a script that left them out may still pass.

    The target is a JSON object with `code_prompt` and `test` (a unittest class named TestCases).
    """

    def __call__(self, response: str, target: str) -> Verdict:
        """Score 1 or 0."""
        asked = json.loads(target)
        program = program_of(response)
        if not program.strip():
            return Verdict("unparseable", 0.0)
        whole = f"{asked['code_prompt']}\n    pass\n{program}"
        return super().__call__(whole, json.dumps({"tests": [asked["test"] + RUN]}))

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None."""
        try:
            asked = json.loads(target)
            return super().complaint(json.dumps({"tests": [asked["test"] + RUN]}))
        except (ValueError, KeyError, TypeError):
            return f"{target[:80]!r} has no code_prompt and test"


def _rows() -> Sequence[Row]:
    rows = DATA.read()
    wanted = sorted({name.partition(".")[0] for row in rows for name in _libraries(row)})
    missing = [name for name in wanted if find_spec(name) is None]
    if missing:
        what = f"{len(missing)} of the {len(wanted)} libraries of its programs are not installed: {', '.join(missing)}"
        raise InputError("task bigcodebench_hard", what, "Install BigCodeBench's Requirements/requirements-eval.txt.")
    return rows


def _libraries(row: Row) -> list[str]:
    found = row["libs"]
    return ast.literal_eval(found) if isinstance(found, str) else list(found)


def _example(row: Row, place: int) -> Example:
    target = json.dumps({"code_prompt": row["code_prompt"], "test": row["test"]})
    turns = (Turn("user", f"{ASKED}{row['instruct_prompt'].strip()}\n"),)
    return Example(row["task_id"], turns, target, prefix=OPENING)


BIGCODEBENCH_HARD = Task(
    name="bigcodebench_hard",
    version=1,
    skill="Code",
    rows=_rows,
    example=_example,
    verifier="bigcodebench",
    own=CalibratedCode(seconds=60.0, memory_mb=30 * 1024, file_mb=256, processes=256),
    metric="pass@10 of 20, calibrated",
    temperature=0.8,
    top_p=0.95,
    samples=20,
    k=10,
    stops=("\n```",),
    source="Tülu 3, table 24: bigcodebench_hard::tulu",
)
