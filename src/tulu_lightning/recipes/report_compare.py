"""Two runs on one page: which of their stages go together, what each reached and cost, and what was set otherwise."""

from typing import NamedTuple

from tulu_lightning.recipes.records import RunRecord, StageRecord
from tulu_lightning.recipes.report_changes import between_runs, changes_table
from tulu_lightning.recipes.report_curves import Other
from tulu_lightning.recipes.report_parts import escape
from tulu_lightning.recipes.report_tasks import compared, matched

__all__ = ["Pairing", "comparison", "pairing"]


SHOWN = 10
"""Settings that differ, up to which their table lies open."""


class Pairing(NamedTuple):
    """Two runs."""

    run: RunRecord
    against: RunRecord
    names: tuple[str, str]
    """What they are called on the page: never the same."""

    def other(self, stage: StageRecord) -> Other | None:
        """The second run's stage that goes with one of the first run; None where there is none."""
        found = next((two for one, two in matched(self.run, self.against) if one is stage), None)
        return None if found is None else Other(found, self.names)


def pairing(run: RunRecord, against: RunRecord) -> Pairing:
    """Two runs, under names that tell them apart: their own, else their folders, else numbers."""
    for names in (
        (run.name, against.name),
        (run.path.name, against.path.name),
        (str(run.path), str(against.path)),
    ):
        if names[0] != names[1]:
            return Pairing(run, against, names)
    return Pairing(run, against, (f"{run.name} (1)", f"{run.name} (2)"))


def comparison(beside: Pairing) -> str:
    """The section."""
    run, against, names = beside
    pairs = matched(run, against)
    here, there = ({id(stage) for stage in side} for side in (zip(*pairs, strict=True) if pairs else ((), ())))
    alone = [f"{stage.name} only in {names[0]}" for stage in run.stages if id(stage) not in here]
    alone += [f"{stage.name} only in {names[1]}" for stage in against.stages if id(stage) not in there]
    left = f'<p class="under">{escape("; ".join(alone))}.</p>' if alone else ""
    lead = f"Differences are {names[0]} less {names[1]}, paired by prompt where both answered the same ones."
    parts = "".join(_stage(one, two, names) for one, two in pairs)
    return f"""<h2 id="compared">Compared</h2><p class="lead">{escape(lead)}</p>
{compared(run, against, names)}{left}{parts}"""


def _stage(one: StageRecord, two: StageRecord, names: tuple[str, str]) -> str:
    facts = [
        _same("start weights", _digest(one.summary, "start_digest"), _digest(two.summary, "start_digest")),
        _same("training data", _digest(one.manifest, "digest"), _digest(two.manifest, "digest")),
    ]
    changes = between_runs(one, two)
    if changes is None:
        facts.append("a config is missing")
    elif not changes:
        facts.append("same settings")
    said = f'<p class="under">{escape(", ".join(fact for fact in facts if fact).capitalize())}.</p>'
    table = changes_table(changes, names) if changes else ""
    if changes and len(changes) > SHOWN:
        table = f"<details><summary>{len(changes)} settings differ</summary>{table}</details>"
    return f"<h3>{escape(one.name)}: settings</h3>{said if any(facts) else ''}{table}"


def _digest(record: object, key: str) -> object:
    return record.get(key) if isinstance(record, dict) else None


def _same(what: str, one: object, other: object) -> str:
    """Nothing is claimed where one of the two is unknown."""
    if one is None or other is None:
        return ""
    return f"{'same' if one == other else 'other'} {what}"
