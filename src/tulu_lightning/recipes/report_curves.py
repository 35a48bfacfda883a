"""One chart of the report: curves of metrics over the steps, with their trend, validations, and a second run beside."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from tulu_lightning.recipes.records import StageRecord
from tulu_lightning.recipes.report_figure import BLUE, GREEN, GREY, ORANGE, RED, VIOLET, layout, legend, wrap

__all__ = ["MAX_POINTS", "PALETTE", "Chart", "Other", "draw", "smooth"]

PALETTE = (BLUE, ORANGE, GREEN, VIOLET, RED, GREY)
MAX_POINTS = 1000
"""Per curve; a longer run is thinned, after smoothing."""
FEW_STEPS = 7
"""Up to so many steps each has its tick."""
DENSE = 30
"""From so many steps on, dots are smaller."""


class Chart(NamedTuple):
    """Metrics that are drawn on one pair of axes."""

    title: str
    note: str
    keys: tuple[str, ...]
    labels: tuple[str, ...] = ()
    """One per key where there is more than one."""
    share: bool = False
    """Values are shares of 1, shown in percent."""
    stacked: bool = False
    colours: tuple[str, ...] = PALETTE
    scale: float = 1.0
    """What values are multiplied by, e.g. bytes to GiB."""


class Other(NamedTuple):
    """The stage of a second run that is drawn beside, and what the two runs are called."""

    stage: StageRecord
    names: tuple[str, str]


class Curve(NamedTuple):
    """One metric of one run."""

    label: str
    """For the legend and on hovering; empty where the chart has one curve only."""
    colour: str
    dash: str
    dotted: bool
    """Whether it belongs to the second run."""


def draw(chart: Chart, stage: StageRecord, name: str, other: Other | None = None) -> str:
    """The chart as an HTML figure.

    Args:
        chart: what to draw.
        stage: whose metrics; validations (`val_<key>`) are drawn with them.
        name: a plain word, different for every figure of the page.
        other: a second run to draw beside; not in a stacked chart.
    """
    if chart.stacked:
        return _stacked(chart, stage, name)
    figure = go.Figure()
    keys: dict[str, str] = {}
    for i, key in enumerate(chart.keys):
        colour = chart.colours[i % len(chart.colours)]
        for run, record in enumerate((stage, other.stage if other else None)):
            if record is None:
                continue
            curve = _curve(chart, i, colour, other, run)
            if any(key in row for row in record.metrics):
                figure.add_traces(_traces(chart, record.metrics, key, curve))
                keys[curve.label] = curve.colour
            if any(f"val_{key}" in row for row in record.validation):
                held = curve._replace(
                    label=f"{curve.label} on held-out rows".strip(), colour=_held_colour(chart, curve)
                )
                figure.add_trace(_validation(chart, record.validation, f"val_{key}", held))
                keys[held.label] = held.colour
    if len(keys) > 1 and "" in keys:
        keys = {label or "training": colour for label, colour in keys.items()}
    _axes(figure, chart, max(len(stage.metrics), len(other.stage.metrics) if other else 0))
    shown = legend(tuple(keys), tuple(keys.values())) if any(keys) else ""
    return wrap(chart.title, chart.note, shown, figure, name)


def _curve(chart: Chart, place: int, colour: str, other: Other | None, run: int) -> Curve:
    label = chart.labels[place] if chart.labels else ""
    if other is None:
        return Curve(label, colour, "solid", False)
    whose = f"{label}, {other.names[run]}" if label else other.names[run]
    # One curve a run: a colour each. Several: the colour says which metric, the dots which run.
    return Curve(whose, colour if run == 0 or chart.labels else VIOLET, "solid" if run == 0 else "dot", run == 1)


def _held_colour(chart: Chart, curve: Curve) -> str:
    return curve.colour if chart.labels else RED if curve.dotted else ORANGE


def _axes(figure: go.Figure, chart: Chart, steps: int) -> None:
    figure.update_layout(**layout(height=200), hovermode="x unified")
    figure.update_yaxes(tickformat=".3~p" if chart.share else "~g")
    if chart.share:
        # A curve that is 0 all along would be given an axis beyond what a share can be; 0.03 is room for the dots.
        figure.update_yaxes(autorangeoptions={"clipmin": -0.03, "clipmax": 1.03})
    if steps <= FEW_STEPS:
        figure.update_xaxes(dtick=1)  # there is no step and a half
    if chart.stacked:
        figure.update_layout(yaxis={"range": [0, 1]} if chart.share else {"rangemode": "tozero"})


def _traces(chart: Chart, metrics: Sequence[Mapping[str, float]], key: str, curve: Curve) -> tuple[go.Scatter, ...]:
    steps, values, line = _series(metrics, key, chart.scale)
    # plotly reads a little HTML in names; a label may come from a file.
    text = html.escape(curve.label)
    hover = f"%{{y{_number(chart)}}}<extra>{text}</extra>"
    dots = {"size": 4 if len(steps) > DENSE else 5, "color": curve.colour, "opacity": 0.25 if curve.dotted else 0.45}
    stroke: dict[str, Any] = {"width": 2, "color": curve.colour}
    if curve.dash != "solid":
        stroke["dash"] = curve.dash
    return (
        go.Scatter(x=steps, y=values, mode="markers", marker=dots, name=text, hovertemplate=hover),
        go.Scatter(x=steps, y=line, mode="lines", line=stroke, name=text, hoverinfo="skip"),
    )


def _validation(chart: Chart, rows: Sequence[Mapping[str, float]], key: str, curve: Curve) -> go.Scatter:
    """As they are, without a trend: there are few, and each is over many rows."""
    steps, values, _ = _series(rows, key, chart.scale)
    text = html.escape(curve.label)
    return go.Scatter(
        x=steps,
        y=values,
        mode="lines+markers",
        line={"width": 1.5, "color": curve.colour, "dash": "dot" if curve.dotted else "dash"},
        marker={"size": 7, "symbol": "diamond", "color": curve.colour},
        name=text,
        hovertemplate=f"%{{y{_number(chart)}}}<extra>{text}</extra>",
    )


def _number(chart: Chart) -> str:
    return ":.1%" if chart.share else ":.4g"


def _stacked(chart: Chart, stage: StageRecord, name: str) -> str:
    figure = go.Figure()
    present = [i for i, key in enumerate(chart.keys) if any(key in row for row in stage.metrics)]
    labels = tuple((chart.labels or chart.keys)[i] for i in present)
    colours = tuple(chart.colours[i % len(chart.colours)] for i in present)
    for i, label, colour in zip(present, labels, colours, strict=True):
        steps, values, _ = _series(stage.metrics, chart.keys[i], chart.scale)
        figure.add_trace(_band(steps, values, label, colour, chart))
    _axes(figure, chart, len(stage.metrics))
    return wrap(chart.title, chart.note, legend(labels, colours), figure, name)


def _band(steps: list[float], values: list[float], label: str, colour: str, chart: Chart) -> go.Scatter:
    shape = {"groupnorm": "fraction"} if chart.share else {}
    text = html.escape(label)
    return go.Scatter(
        x=steps,
        y=values,
        mode="lines" if len(steps) > 1 else "markers",  # a single step has no area to fill: show it as a point
        stackgroup="all",
        name=text,
        hovertemplate=f"%{{y{_number(chart)}}}<extra>{text}</extra>",
        line={"width": 0.5, "color": colour},
        fillcolor=_clear(colour),
        marker={"color": colour},
        **shape,
    )


def _clear(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.75)"


def _series(
    metrics: Sequence[Mapping[str, float]], key: str, scale: float = 1.0
) -> tuple[list[float], list[float], list[float]]:
    """Steps, values and smoothed values of one metric, thinned to what a small chart can show."""
    points = [(row["step"], scale * row[key]) for row in metrics if key in row]
    line = smooth([value for _, value in points])
    stride = -(-len(points) // MAX_POINTS) or 1
    steps, values = [s for s, _ in points], [v for _, v in points]
    return steps[::stride], values[::stride], line[::stride]


def smooth(values: Sequence[float]) -> list[float]:
    """The trend of a series: at every point a straight line is fitted to its surroundings, a fifth of the run to a side.

    Weights fall off by the tricube (Cleveland 1979, LOWESS without its robust passes). Unlike a moving average it does
    not lag behind a trend, at the ends neither; a straight line comes out as it went in.
    """
    if not values:
        return []
    # Counted from the first value, so that rounding does not draw a constant series as a jagged one.
    y = np.asarray(values, dtype=np.float64) - values[0]
    reach = max(len(y) / 5, 3.0)
    line = []
    for i in range(len(y)):
        low, high = max(0, math.ceil(i - reach)), min(len(y), math.floor(i + reach) + 1)
        x = np.arange(low, high, dtype=np.float64) - i
        w = (1 - np.abs(x / reach) ** 3) ** 3
        w /= w.sum()
        mean_x, mean_y = w @ x, w @ y[low:high]
        spread = w @ (x - mean_x) ** 2
        slope = w @ ((x - mean_x) * y[low:high]) / spread if spread > 0 else 0.0
        line.append(values[0] + float(mean_y - slope * mean_x))
    return line
