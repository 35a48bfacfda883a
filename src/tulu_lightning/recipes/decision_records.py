"""What was decided on the checkpoints of a stage: by its sealed records, else by its closing record alone.

The records lie at `RUN/promotions/` (`checkpoints.promoted`), one a decision, and are there before the stage is closed: a
stage that was killed may have promoted. `summary.json` holds the decision that stands, which is all that there is of
stages without records.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tulu_lightning.checkpoints.promoted import read_record
from tulu_lightning.errors import InputError
from tulu_lightning.recipes.reading import mapping, number, text

__all__ = ["Decision", "Verdict", "decision_in_summary", "read_decisions", "standing"]

START = "before"


class Verdict(NamedTuple):
    """What one task said: its paired difference, with an interval of its own confidence."""

    task: str
    role: str
    """`gain` or `guard`."""
    difference: float | None
    low: float | None
    high: float | None
    confidence: float | None
    reason: str
    against: str = START
    """The moment whose scores the difference is held against: `before`, or `step_<n>` where that had been promoted."""


class Decision(NamedTuple):
    """Whether a checkpoint of the stage moved on, and the paired difference (after minus before) that decided it."""

    promote: bool
    reason: str
    difference: float | None
    low: float | None
    high: float | None
    verdicts: tuple[Verdict, ...] = ()
    """By task; the first is the one whose difference the decision names. Empty where nothing was compared."""
    step: int | None = None
    """Finished steps of the checkpoint; None where only the closing record tells of it."""
    moment: str = ""
    """Whose scores were offered: `step_<n>` or `after`; empty as `step`."""
    look: int = 1
    looks: int = 1

    @property
    def task(self) -> str:
        """The task whose difference it names; empty where it is not known."""
        return self.verdicts[0].task if self.verdicts else ""

    @property
    def confidence(self) -> float | None:
        """Of its interval; None where it was not recorded."""
        return self.verdicts[0].confidence if self.verdicts else None

    @property
    def over_stage(self) -> bool:
        """Whether the difference is that of the stage's end to its start, as far as it is known."""
        against = self.verdicts[0].against if self.verdicts else START
        return self.moment in ("", "after") and against == START


def read_decisions(folder: Path, name: str, notes: list[str]) -> tuple[Decision, ...]:
    """The sealed decisions of a stage, by step.

    Args:
        folder: of the stage.
        name: of the stage, for notes.
        notes: a record that does not hold what was sealed is left out, and named here.
    """
    records = []
    for path in sorted((folder / "promotions").glob("step-*.json")):
        try:
            record = read_record(path)
        except InputError as error:
            notes.append(f"{name}/promotions/{path.name} was left out: {error.what}.")
            continue
        if number(record.get("step")) is not None:
            records.append(record)
    found: list[Decision] = []
    replaced = START
    for record in sorted(records, key=lambda record: record["step"]):
        found.append(_decision(mapping(record.get("decision")), record, replaced))
        replaced = text(record.get("moment")) if found[-1].promote else replaced
    return tuple(found)


def standing(decisions: Sequence[Decision]) -> Decision | None:
    """The one that counts, as in the closing record: the last that promoted, else the last."""
    promoted = [decision for decision in decisions if decision.promote]
    return (promoted or [*decisions] or [None])[-1]


def decision_in_summary(summary: Mapping[str, Any] | None) -> Decision | None:
    """The decision that a closing record holds; None where it tells of none."""
    if summary is None:
        return None
    value = summary.get("decision")
    if not isinstance(value, dict):
        promoted = summary.get("promoted")
        return None if promoted is None else Decision(promoted is True, "", None, None, None)
    return _decision(value, {}, START)


def _decision(value: Mapping[str, Any], record: Mapping[str, Any], replaced: str) -> Decision:
    step, look, looks = (number(found) for found in (record.get("step"), value.get("look"), value.get("looks")))
    verdicts = value.get("verdicts")
    return Decision(
        promote=value.get("promote") is True,
        reason=text(value.get("reason")),
        difference=number(value.get("difference")),
        low=number(value.get("low")),
        high=number(value.get("high")),
        verdicts=tuple(_verdict(mapping(one), replaced) for one in verdicts) if isinstance(verdicts, list) else (),
        step=None if step is None else int(step),
        moment=text(record.get("moment")),
        look=int(look or 1),
        looks=int(looks or 1),
    )


def _verdict(value: Mapping[str, Any], replaced: str) -> Verdict:
    """Gains are held against what would be replaced, guards always against the start (`callbacks.offer`)."""
    difference, low, high, confidence = (number(value.get(key)) for key in ("difference", "low", "high", "confidence"))
    role = text(value.get("role"))
    against = replaced if role == "gain" else START
    return Verdict(text(value.get("task")), role, difference, low, high, confidence, text(value.get("reason")), against)
