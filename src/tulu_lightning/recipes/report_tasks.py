"""Scores by checkpoint, a task a line, as in Table 6 of the Tülu 3 paper; and two runs against each other."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tulu_lightning.core.promotion import HELD_OUT
from tulu_lightning.recipes.reading import number
from tulu_lightning.recipes.records import RunRecord, Scores, StageRecord
from tulu_lightning.recipes.report_parts import cell_table
from tulu_lightning.recipes.score_records import MOMENT, paired_gain
from tulu_lightning.recipes.table import NOTHING, Cell, count, duration, memory

__all__ = ["Checkpoint", "checkpoints", "compared", "matched", "moments_of", "task_table", "tasks_of"]

OTHER_SETTINGS = "°"
AVERAGE = "average"


class Checkpoint(NamedTuple):
    """A model along the run: the one it started from, or what a stage made."""

    name: str
    scores: Mapping[str, Scores]
    """By task."""


def checkpoints(run: RunRecord) -> list[Checkpoint]:
    """The start of the first stage that was scored, then the end of every stage that was."""
    found = []
    for stage in run.stages:
        before, after = _at(stage, "before"), _at(stage, "after")
        if before and not found:
            found.append(Checkpoint("start", before))
        if after:
            found.append(Checkpoint(stage.name, after))
    return found


def _at(stage: StageRecord, moment: str) -> dict[str, Scores]:
    held_out = stage.before if moment == "before" else stage.after
    named = {held_out.task or HELD_OUT: held_out} if held_out else {}
    return {**named, **stage.tasks.get(moment, {})}


def tasks_of(stage: StageRecord) -> list[str]:
    """Names of the tasks that it was scored on at any moment, besides the held-out prompts."""
    return list(dict.fromkeys(task for scores in stage.tasks.values() for task in scores))


def moments_of(stage: StageRecord, task: str) -> list[tuple[int, Scores]]:
    """(finished steps, scores) of a task, or of the held-out prompts: the start, those in between, the end."""
    last = max((int(row["step"]) for row in stage.metrics), default=0)
    if task == HELD_OUT:
        before, after, between = stage.before, stage.after, dict(stage.between)
    else:
        before, after = (stage.tasks.get(when, {}).get(task) for when in ("before", "after"))
        named = [(MOMENT.fullmatch(when), scores[task]) for when, scores in stage.tasks.items() if task in scores]
        between = {int(found[1]): scores for found, scores in named if found and found[1]}
    moments = {0: before, **dict(sorted(between.items()))}
    if after is not None and last not in moments:
        moments[last] = after
    return [(step, scores) for step, scores in moments.items() if scores is not None]


def task_table(run: RunRecord) -> str:
    """A line a task, a column a checkpoint, the best of each line in bold; empty for fewer than two checkpoints."""
    found = checkpoints(run)
    if len(found) < 2:
        return ""
    tasks = list(dict.fromkeys(task for checkpoint in found for task in checkpoint.scores))
    rows, best, comparable = [], [], []
    for task in tasks:
        line = [checkpoint.scores.get(task) for checkpoint in found]
        first = next(s for s in line if s is not None)
        n = f"n = {first.n:,}" if first.n else ""
        apart = [s is not None and s.settings_hash != first.settings_hash for s in line]
        rows.append([Cell(task, n), *(_cell(s, other) for s, other in zip(line, apart, strict=True))])
        alike = [None if other else s for s, other in zip(line, apart, strict=True)]
        comparable.append(alike)
        best.append(_best([None if s is None else s.accuracy for s in alike]))
    if len(tasks) > 1:
        means = [_mean([line[place] for line in comparable]) for place in range(len(found))]
        rows.append([Cell(AVERAGE), *(Cell(NOTHING if m is None else f"{100 * m:.1f}") for m in means)])
        best.append(_best(means))
    table = cell_table(["Task", *(checkpoint.name for checkpoint in found)], rows, best=best)
    other = any(cell.text.endswith(OTHER_SETTINGS) for row in rows for cell in row[1:])
    mark = f" {OTHER_SETTINGS} was taken with other settings than the first of its line: do not compare them."
    lead = f"In percent, with 95% intervals; the best of each line in bold.{mark if other else ''}"
    return f'<h3>By checkpoint</h3><p class="lead">{lead}</p>{table}'


def _cell(scores: Scores | None, other_settings: bool) -> Cell:
    if scores is None:
        return Cell(NOTHING)
    return Cell(f"{100 * scores.accuracy:.1f}{OTHER_SETTINGS if other_settings else ''}", interval(scores))


def interval(scores: Scores) -> str:
    """`39.5–50.7`; empty where there is none."""
    return "" if scores.low is None or scores.high is None else f"{100 * scores.low:.1f}–{100 * scores.high:.1f}"


def _best(values: Sequence[float | None]) -> int:
    """Column (from 1) of the highest value; 0 where several share it, or none is."""
    shown = [None if value is None else round(value, 3) for value in values]  # as far as it is printed
    known = [value for value in shown if value is not None]
    if len(known) < 2 or known.count(max(known)) > 1:
        return 0
    return shown.index(max(known)) + 1


def _mean(line: Sequence[Scores | None]) -> float | None:
    """Over all tasks, or none: a mean over other tasks is another number."""
    known = [s.accuracy for s in line if s is not None]
    return sum(known) / len(known) if len(known) == len(line) else None


def matched(run: RunRecord, against: RunRecord) -> list[tuple[StageRecord, StageRecord]]:
    """Stages of two runs that go together: those of one name, or the only stage of each."""
    if len(run.stages) == len(against.stages) == 1:
        return [(run.stages[0], against.stages[0])]
    named = {stage.name: stage for stage in against.stages}
    return [(stage, named[stage.name]) for stage in run.stages if stage.name in named]


def compared(run: RunRecord, against: RunRecord, names: tuple[str, str]) -> str:
    """What each stage of two runs reached and cost, line by line."""
    rows = [line for pair in matched(run, against) for line in _lines(*pair)]
    if not rows:
        return '<p class="empty">The two runs have no stage in common.</p>'
    return cell_table(["Stage", *names, "Difference"], rows)


def _lines(one: StageRecord, two: StageRecord) -> list[tuple[Cell, Cell, Cell, Cell]]:
    lines = []
    here, there = _at(one, "after"), _at(two, "after")
    for task in dict.fromkeys([*here, *there]):
        a, b = here.get(task), there.get(task)
        cells = [Cell(NOTHING) if s is None else Cell(f"{100 * s.accuracy:.1f}%", interval(s)) for s in (a, b)]
        lines.append((Cell(one.name, f"{task}, at the end"), *cells, _gain(a, b)))
    for label, key, shown in (("time", "seconds", duration), ("tokens", "tokens", count)):
        a, b = one.total(key), two.total(key)
        if a is not None or b is not None:
            lines.append((Cell(one.name, label), Cell(shown(a)), Cell(shown(b)), _ratio(a, b)))
    a, b = (number((stage.summary or {}).get("peak_memory_bytes")) for stage in (one, two))
    if a is not None or b is not None:
        lines.append((Cell(one.name, "peak memory"), Cell(memory(a)), Cell(memory(b)), _ratio(a, b)))
    return lines


def _gain(a: Scores | None, b: Scores | None) -> Cell:
    """The first run's score less the second's; with its paired interval where both answered the same prompts."""
    if a is None or b is None:
        return Cell(NOTHING)
    if a.settings_hash != b.settings_hash:
        return Cell(NOTHING, "other settings")
    points = f"{100 * (a.accuracy - b.accuracy):+.1f} pts"
    found = paired_gain(b, a)
    return Cell(points, "" if found is None else f"{100 * found.low:+.1f} to {100 * found.high:+.1f}, paired")


def _ratio(a: float | None, b: float | None) -> Cell:
    return Cell(f"× {a / b:.2f}") if a is not None and b else Cell(NOTHING)
