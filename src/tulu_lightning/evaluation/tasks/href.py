"""HREF (Lyu et al. 2024): named, so that the suite says what is missing of it.

Tülu 3 scores 11 kinds of instructions against Llama-3.1-405B-Instruct's answers: two kinds by the similarity of RoBERTa
embeddings, two by Llama-3.1-70B-Instruct alone, seven by it with a human reference. The judge's prompts and the baseline's
answers are in no package or data set that could be read here, and other ones would make another score.
"""

from collections.abc import Sequence

from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.suite import SUITES
from tulu_lightning.evaluation.task import Example, Row, Task, Turn

__all__ = ["HREF"]


def _rows() -> Sequence[Row]:
    what = "its judge's prompts and its baseline's answers are not to be had, so its score cannot be made here"
    others = " ".join(name for name in SUITES["tulu3_unseen"] if name != "href")
    raise InputError("task href", what, f"Leave it out: --suite {others}, and run github.com/allenai/href for it.")


HREF = Task(
    name="href",
    version=1,
    skill="Chat",
    rows=_rows,
    example=lambda row, place: Example(f"href/{place}", (Turn("user", row["instruction"]),), ""),
    verifier="exact",
    metric="win rate",
    source="Tülu 3, table 24",
)
