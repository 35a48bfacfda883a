"""Where a run's time and memory went, by stage and by phase of a step."""

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from tulu_lightning.recipes.reading import number
from tulu_lightning.recipes.records import StageRecord
from tulu_lightning.recipes.report_figure import BLUE, GREEN, GREY, ORANGE, RED, VIOLET, layout, legend, wrap
from tulu_lightning.recipes.report_parts import cell_table
from tulu_lightning.recipes.table import NOTHING, Cell, count, duration, memory

__all__ = ["cost_section", "phases"]

PHASES = {
    "seconds_generate": ("generate", BLUE),
    "seconds_score": ("score", ORANGE),
    "seconds_logprobs": ("log-probs", GREEN),
    "seconds_update": ("update", VIOLET),
    "seconds_sync": ("refresh", GREY),
    "seconds_wait": ("wait", RED),
}
WHOLE, REST = "whole steps", "rest of the step"
COLOURS = dict(PHASES.values()) | {WHOLE: "#2f95ad", REST: "#5b6472"}
LEAST_REST = 0.005
"""Share of the time below which the rest is rounding."""


def phases(stage: StageRecord) -> dict[str, float]:
    """Seconds of each phase over all recorded steps; `whole steps` for a stage that records no phases.

    Of phases that run beside each other (sampling ahead) the sum may be more than the time of the steps.
    """
    total = stage.total("seconds") or sum(row.get("seconds", 0.0) for row in stage.metrics)
    sums = {name: sum(row.get(key, 0.0) for row in stage.metrics) for key, (name, _) in PHASES.items()}
    known = {name: value for name, value in sums.items() if value > 0}
    if not known:
        return {WHOLE: total} if total > 0 else {}
    rest = total - sum(known.values())
    return known | ({REST: rest} if rest > LEAST_REST * total else {})


def cost_section(stages: Sequence[StageRecord]) -> str:
    """Chart and table of the section; empty where no stage has recorded any time."""
    spent = [(stage, found) for stage in stages if (found := phases(stage))]
    if not spent:
        return ""
    rows = [_row(stage, found) for stage, found in spent]
    headings = ("Stage", "Time", "A step", "Tokens", "Tokens a second", "Peak memory", "Phases")
    lead = (
        "Of the recorded steps; scoring held-out prompts and saving are not in it. Peak memory is that of the stage's "
        "process (resident on a CPU)."
    )
    return f"""<h2 id="cost">Time and memory</h2><p class="lead">{lead}</p>{_chart(spent)}
<div style="margin-top:12px">{cell_table(headings, rows, left=("Phases",))}</div>"""


def _row(stage: StageRecord, found: dict[str, float]) -> list[Cell]:
    seconds, tokens = stage.total("seconds") or sum(found.values()), stage.total("tokens")
    steps = number((stage.summary or {}).get("steps")) or len(stage.metrics)
    shares = ", ".join(f"{name} {value / seconds:.0%}" for name, value in found.items() if name != WHOLE)
    return [
        Cell(stage.name, f"{steps:,.0f} steps" if steps else ""),
        Cell(duration(seconds)),
        Cell(_brief(seconds / steps) if steps else NOTHING),
        Cell(count(tokens)),
        Cell(NOTHING if tokens is None else count(tokens / seconds)),
        Cell(memory(_peak(stage))),
        Cell(shares or NOTHING),
    ]


def _peak(stage: StageRecord) -> float | None:
    recorded = [row["peak_memory_bytes"] for row in stage.metrics if "peak_memory_bytes" in row]
    return number((stage.summary or {}).get("peak_memory_bytes")) or max(recorded, default=None)


def _brief(seconds: float) -> str:
    return f"{1000 * seconds:.0f}ms" if seconds < 1 else duration(seconds)


def _chart(spent: Sequence[tuple[StageRecord, dict[str, float]]]) -> str:
    figure = go.Figure()
    names = list(dict.fromkeys(name for _, found in spent for name in found))
    order = [name for name in COLOURS if name in names]
    places = list(range(len(spent), 0, -1))
    for name in order:
        figure.add_trace(
            go.Bar(
                x=[found.get(name, 0.0) for _, found in spent],
                y=places,
                orientation="h",
                width=0.6,
                marker={"color": COLOURS[name]},
                name=name,
                customdata=[html.escape(stage.name) for stage, _ in spent],
                hovertemplate="%{customdata}: %{x:.3~s}s<extra>" + name + "</extra>",
            )
        )
    look: dict[str, Any] = layout(height=60 + 44 * len(spent))
    ticks = {"tickvals": places, "ticktext": [html.escape(stage.name) for stage, _ in spent]}
    look["yaxis"] |= {**ticks, "showgrid": False, "range": [0.4, len(spent) + 0.6], "tickfont": {"size": 13}}
    look["xaxis"] |= {"showgrid": True, "rangemode": "tozero", "ticksuffix": "s", "nticks": 6}
    del look["xaxis"]["unifiedhovertitle"]
    figure.update_layout(**look, barmode="stack", hovermode="closest")
    keys = legend(order, [COLOURS[name] for name in order])
    return wrap("Where the time went", "all steps of a stage", keys, figure, "cost")
