"""Every decision on a checkpoint of the run, with what each task said to it."""

from collections.abc import Iterator, Sequence

from tulu_lightning.recipes.decision_records import Decision, Verdict
from tulu_lightning.recipes.records import StageRecord
from tulu_lightning.recipes.report_parts import cell_table
from tulu_lightning.recipes.table import NOTHING, Cell, over, percent, points, span

__all__ = ["decisions_table"]

HEADINGS = ("Checkpoint", "Task", "Difference", "Confidence", "Decision", "Reason")


def decisions_table(stages: Sequence[StageRecord]) -> str:
    """A line for every task that had a say in a sealed decision, in the order of the steps; empty where none is sealed."""
    rows = [row for stage in stages for decision in stage.decisions for row in _rows(stage.name, decision)]
    if not rows:
        return ""
    lead = (
        "Differences are paired by item. A gain is held against what was promoted last, a guard against the stage's "
        "start; looks and tasks share the rule's level, so that each interval has a confidence of its own."
    )
    table = cell_table(HEADINGS, rows, left=("Task", "Decision", "Reason"))
    return f'<h3 id="promotions">Promotion decisions</h3><p class="lead">{lead}</p>{table}'


def _rows(stage: str, decision: Decision) -> Iterator[tuple[Cell, ...]]:
    checkpoint = Cell(stage, f"step {decision.step}")
    answer = Cell("promoted" if decision.promote else "not promoted")
    if not decision.verdicts:
        yield checkpoint, Cell(NOTHING), Cell(NOTHING), Cell(NOTHING), answer, Cell(decision.reason)
    look = f"look {decision.look} of {decision.looks}: " if decision.looks > 1 else ""
    for verdict in decision.verdicts:
        yield checkpoint, *_said(verdict), answer, Cell(f"{look}{verdict.reason}")


def _said(verdict: Verdict) -> tuple[Cell, Cell, Cell]:
    """Task, difference, confidence."""
    task = Cell(verdict.task, f"{verdict.role}{over(verdict.against)}")
    if verdict.difference is None:
        return task, Cell(NOTHING), Cell(NOTHING)
    confidence = NOTHING if verdict.confidence is None else percent(verdict.confidence)
    return task, Cell(points(verdict.difference), span(verdict.low, verdict.high)), Cell(confidence)
