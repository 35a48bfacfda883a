"""What evaluation tasks ask, as rows that training data is held against (`configs/data/tulu3_evaluations.yaml`)."""

from typing import Any

from tulu_lightning.evaluation.suite import find_task

__all__ = ["task_rows"]


def task_rows(task: str) -> list[dict[str, Any]]:
    """All rows of a task's data set, as the task reads them: a package's, the hub's, or a file's that was named.

    Args:
        task: its name, e.g. "gsm8k".

    Raises:
        InputError: there is no such task, or its rows are not here; what would provide them is said.
    """
    return [dict(row) for row in find_task(task).rows()]
