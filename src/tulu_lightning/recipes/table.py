"""The score table: accuracy before and after every stage, what it cost, and whether its checkpoint moved on."""

from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from tulu_lightning.recipes.reading import number
from tulu_lightning.recipes.records import RunRecord, Scores, StageRecord, read_run
from tulu_lightning.recipes.score_records import paired_gain

HEADINGS = ("Stage", "Before", "After", "Difference", "Time", "Tokens", "Peak memory", "Promoted")
FIGURES = frozenset(HEADINGS) - {"Stage", "Promoted"}
"""The headings whose columns hold figures, and stand to the right."""
NOTHING = "–"


class Cell(NamedTuple):
    """A figure and, under it, what qualifies it: an interval, or a reason."""

    text: str
    detail: str = ""


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
    """What the figures are: on how many held-out prompts, with which interval."""
    sizes = sorted({s.n for stage in run.stages for s in (stage.before, stage.after) if s is not None and s.n})
    prompts = f" on {' or '.join(map(str, sizes))} held-out prompts" if sizes else ""
    return f"accuracy{prompts}, with 95% intervals"


def score_rows(run: RunRecord) -> list[tuple[Cell, ...]]:
    """One row a stage, cells in the order of `HEADINGS`."""
    return [_row(stage) for stage in run.stages]


def _row(stage: StageRecord) -> tuple[Cell, ...]:
    summary = stage.summary or {}
    return (
        Cell(stage.name, progress(stage)),
        _accuracy(stage.before),
        _accuracy(stage.after),
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
    difference, low, high = gain(stage)
    if difference is None:
        return Cell(NOTHING)
    interval = "" if low is None or high is None else f"{100 * low:+.1f} to {100 * high:+.1f}"
    return Cell(f"{100 * difference:+.1f} pts", interval)


def gain(stage: StageRecord) -> tuple[float | None, float | None, float | None]:
    """What the stage gained, with its interval: as the promotion decided by, else from the scores, paired by prompt.

    Returns:
        (difference, low, high); None where it is not known, or the two scores do not compare.
    """
    if stage.decision is not None and stage.decision.difference is not None:
        return stage.decision.difference, stage.decision.low, stage.decision.high
    before, after = stage.before, stage.after
    found = None if before is None or after is None else paired_gain(before, after)
    return (None, None, None) if found is None else found


def _verdict(stage: StageRecord) -> Cell:
    if stage.decision is None:
        return Cell(NOTHING, pairs_made(stage))
    return Cell("yes" if stage.decision.promote else "no", stage.decision.reason)


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
