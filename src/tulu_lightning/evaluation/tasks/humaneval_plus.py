"""HumanEval+ (Liu et al. 2023) as `codex_humanevalplus::tulu` of OLMES: HumanEval asked alike, with many more tests."""

from dataclasses import replace

from tulu_lightning.evaluation.rows import DataSet
from tulu_lightning.evaluation.tasks.humaneval import HUMANEVAL, HUMANEVAL_PLAIN
from tulu_lightning.verifiers.code import Code

__all__ = ["DATA", "HUMANEVAL_PLUS", "HUMANEVAL_PLUS_PLAIN"]

DATA = DataSet(name="humaneval_plus", hub="evalplus/humanevalplus", count=164)
# Its tests compare arrays: numpy, and the threads that it starts, want room.
JUDGE = Code(seconds=30.0, memory_mb=4096, processes=128)

HUMANEVAL_PLUS = replace(
    HUMANEVAL,
    name="humaneval_plus",
    rows=DATA.read,
    own=JUDGE,
    source="Tülu 3, table 24: codex_humanevalplus::tulu",
)
HUMANEVAL_PLUS_PLAIN = replace(HUMANEVAL_PLAIN, name="humaneval_plus_plain", rows=DATA.read, own=JUDGE)
