"""The score table: the score before and after every stage, what it cost, and whether its checkpoint moved on.

The score is that of the task that decides: the held-out prompts, or a task of a suite, which is then named.
"""

import math
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from tulu_lightning.core.promotion import HELD_OUT
from tulu_lightning.recipes.decision_records import Decision
from tulu_lightning.recipes.reading import number
from tulu_lightning.recipes.records import RunRecord, Scores, StageRecord, read_run
from tulu_lightning.recipes.score_records import MOMENT, paired_gain

HEADINGS = ("Stage", "Before", "After", "Difference", "Time", "Tokens", "Peak memory", "Promoted")
CONFIDENCE = 0.95
"""Of every interval that does not say its own."""
FIGURES = frozenset(HEADINGS) - {"Stage", "Promoted"}
"""The headings whose columns hold figures, and stand to the right."""
NOTHING = "–"


class Cell(NamedTuple):
    """A figure and, under it, what qualifies it: an interval, or a reason."""

    text: str
    detail: str = ""


class Gained(NamedTuple):
    """A paired difference with its interval."""

    difference: float
    low: float | None
    high: float | None
    confidence: float = CONFIDENCE
    at: str = ""
    """Which checkpoints it is of, where they are not the stage's end and its start."""


def score_table(run_dir: Path) -> Table:
    """The score table of a run for the terminal, the same as in the report.

    Raises:
        InputError: `run_dir` is not a run folder.
    """
    run = read_run(run_dir)
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{run.name}: {what_is_scored(run)}",
        padding=0,
        title_justify="left",
        caption_justify="left",
    )
    for heading in HEADINGS:
        figures = heading in FIGURES
        # Narrow on purpose: eighty columns have to do, so reasons go under the table.
        table.add_column(heading.replace(" ", "\n"), justify="right" if figures else "left", no_wrap=True)
    remarks = []
    for stage, cells in zip(run.stages, score_rows(run), strict=True):
        first, *figures, last = cells
        # Text, not markup: a name is free to hold square brackets.
        table.add_row(Text(first.text), *(_stacked(cell) for cell in figures), Text(last.text))
        remarks.append(": ".join((stage.name, ", ".join(part for part in (first.detail, last.detail) if part))))
    table.caption = Text("\n".join(remarks), style="dim")
    return table


def what_is_scored(run: RunRecord) -> str:
    """What the figures are: on how many items of what, with which interval."""
    sizes: dict[str, set[int]] = {}
    for stage in run.stages:
        for scores in stage.ends:
            if scores is not None and scores.n:
                sizes.setdefault(stage.decided_by, set()).add(scores.n)
    parts = []
    for task, found in sizes.items():
        n = " or ".join(map(str, sorted(found)))
        parts.append(f"{n} held-out prompts" if task == HELD_OUT else f"{n} items of {task}")
    what = "accuracy" if set(sizes) <= {HELD_OUT} else "score"
    own = "" if all(_usual(gain(stage)) for stage in run.stages) else " where no other confidence is given"
    return f"{what}{' on ' if parts else ''}{' and '.join(parts)}, with 95% intervals{own}"


def _usual(found: Gained | None) -> bool:
    return found is None or percent(found.confidence) == percent(CONFIDENCE)


def percent(confidence: float) -> str:
    """`98.33%`: not rounded up, since it is a promise."""
    return f"{math.floor(confidence * 1e4) / 100:g}%"


def score_rows(run: RunRecord) -> list[tuple[Cell, ...]]:
    """One row a stage, cells in the order of `HEADINGS`."""
    return [_row(stage) for stage in run.stages]


def _row(stage: StageRecord) -> tuple[Cell, ...]:
    summary = stage.summary or {}
    before, after = stage.ends
    task = "" if stage.decided_by == HELD_OUT else stage.decided_by
    return (
        Cell(stage.name, " · ".join(part for part in (progress(stage), task) if part)),
        _accuracy(before),
        _accuracy(after),
        _difference(stage),
        Cell(duration(stage.total("seconds"))),
        Cell(count(stage.total("tokens"))),
        Cell(memory(number(summary.get("peak_memory_bytes")))),
        _verdict(stage),
    )


def progress(stage: StageRecord) -> str:
    """How far a stage came: `60 steps`, `34 steps so far`, `not started`."""
    steps = number((stage.summary or {}).get("steps"))
    if stage.status == "finished":
        return "finished" if steps is None else f"{int(steps)} steps"
    return f"{len(stage.metrics)} steps so far" if stage.status == "unfinished" else stage.status


def pairs_made(stage: StageRecord) -> str:
    """What the pair-making stage made: `412 pairs from 1,200 samples of 300 prompts`; empty for other stages."""
    pairs, samples, prompts = (number((stage.summary or {}).get(key)) for key in ("pairs", "samples", "prompts"))
    if pairs is None:
        return ""
    return f"{pairs:,.0f} pairs" + (
        f" from {samples:,.0f} samples of {prompts:,.0f} prompts" if samples is not None and prompts is not None else ""
    )


def _accuracy(scores: Scores | None) -> Cell:
    if scores is None:
        return Cell(NOTHING)
    interval = "" if scores.low is None or scores.high is None else f"{100 * scores.low:.1f}–{100 * scores.high:.1f}"
    return Cell(f"{100 * scores.accuracy:.1f}%", interval)


def _difference(stage: StageRecord) -> Cell:
    found = gain(stage)
    if found is None:
        return Cell(NOTHING)
    confidence = "" if _usual(found) else f"at {percent(found.confidence)}"
    # Lines of their own on a terminal; a browser makes spaces of them.
    parts = (span(found.low, found.high), confidence, found.at)
    return Cell(points(found.difference), "\n".join(part for part in parts if part))


def points(difference: float) -> str:
    """`+2.5 pts`."""
    return f"{100 * difference:+.1f} pts"


def span(low: float | None, high: float | None) -> str:
    """The interval of a difference: `-0.4 to +2.6`; empty where there is none."""
    return "" if low is None or high is None else f"{100 * low:+.1f} to {100 * high:+.1f}"


def gain(stage: StageRecord) -> Gained | None:
    """What the stage gained on the task that decides.

    As the promotion decided by, where that held the stage's end against its start; else from the scores of the two,
    paired by item. A stage that has no scores of its end yet has what was decided in between.

    Returns:
        None where it is not known, or the two scores do not compare.
    """
    decision, (before, after) = stage.decision, stage.ends
    if decision is not None and decision.difference is not None and (decision.over_stage or after is None):
        at = "" if decision.over_stage else _checkpoints(decision)
        confidence = decision.confidence or CONFIDENCE
        return Gained(decision.difference, decision.low, decision.high, confidence, at)
    found = None if before is None or after is None else paired_gain(before, after)
    return None if found is None else Gained(*found)


def _checkpoints(decision: Decision) -> str:
    return f"step {decision.step}" + over(decision.verdicts[0].against)


def over(moment: str) -> str:
    """What a difference is held against, where that is not the start: ` over step 20`."""
    found = MOMENT.fullmatch(moment)
    if moment == "before" or found is None:
        return ""
    return f" over step {int(found[1])}" if found[1] else " over the former end"


def _verdict(stage: StageRecord) -> Cell:
    decision = stage.decision
    if decision is None:
        return Cell(NOTHING, pairs_made(stage))
    answer = "yes" if decision.promote else "no" if stage.status == "finished" else "not yet"
    which = "" if decision.step is None or decision.moment == "after" else f"step {decision.step}: "
    return Cell(answer, f"{which}{decision.reason}")


def duration(seconds: float | None) -> str:
    """`4.5s`, `45s`, `8m 32s`, `3h 05m`."""
    if seconds is None:
        return NOTHING
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def count(value: float | None) -> str:
    """`950`, `12.3k`, `4.6M`: three figures are enough to compare."""
    if value is None:
        return NOTHING
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:  # what would round up to 1000 of the smaller letter
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def memory(size: float | None) -> str:
    """Bytes as GiB, or MiB below one."""
    if size is None:
        return NOTHING
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _stacked(cell: Cell) -> Text:
    text = Text(cell.text)
    return text.append(f"\n{cell.detail}", style="dim") if cell.detail else text
