"""The report's curves: which metrics share a chart, and the charts themselves, by plotly."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
import plotly.offline

from tulu_lightning.recipes.records import Scores, StageRecord
from tulu_lightning.recipes.report_figure import BLUE, GREEN, GREY, ORANGE, RED, VIOLET, layout, legend, wrap

PALETTE = (BLUE, ORANGE, GREEN, VIOLET, RED, GREY)
MAX_POINTS = 1000
"""Per curve; a longer run is thinned, after smoothing."""
FEW_STEPS = 7
"""Up to so many steps each has its tick."""
BY_SOURCE = ("loss", "margin", "accuracy")
"""Metrics of which a stage may record `name/source` as well."""
_HIDDEN = {"step", "time", "stage"}


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


SIDES = (("chosen", "rejected"), False, False, (BLUE, ORANGE))
"""Labels to colours of a chart that has a curve for each side of the pairs."""


CHARTS = (
    Chart("Loss", "what the optimiser minimises", ("loss",)),
    Chart("Reward", "per response: verifier, penalty for no end; without the KL term", ("reward",)),
    Chart("Verifier score", "mean over the sampled responses", ("score",), share=True),
    Chart("KL to the reference", "nats a token, k1 estimate", ("kl",)),
    Chart("Response length", "tokens", ("length",)),
    Chart("Entropy", "nats a token", ("entropy",)),
    Chart("Clip share", "tokens whose ratio was clipped", ("clip_share",), share=True),
    Chart("Sampler against trainer", "KL in nats a token, k3; healthy is 0.001 in bfloat16", ("mismatch_kl",)),
    Chart("Groups without signal", "all rewards of a group equal", ("zero_signal_share",), share=True),
    Chart("Explained variance", "of the returns, by the critic; 1 is perfect, below 0 is harmful", ("explained_variance",)),
    Chart("Margin", "reward of chosen minus rejected", ("margin",)),
    Chart("Pair accuracy", "pairs whose chosen answer has the higher reward", ("accuracy",), share=True),
    Chart("Implicit rewards", "β times the log-ratio to the reference", ("rewards_chosen", "rewards_rejected"), *SIDES),
    Chart("Lengths of the pairs", "tokens; where one side stays longer, the loss may teach length",
          ("length_chosen", "length_rejected"), *SIDES),
    Chart("Log-probs of the answers", "nats; chosen may fall too: DPO moves likelihood to other answers (displacement)",
          ("logp_chosen", "logp_rejected"), *SIDES),
    Chart("KL on the pairs", "of the policy to the reference", ("kl_chosen", "kl_rejected"), *SIDES),
    Chart("Outcomes", "share of the sampled responses",
          ("outcome_right", "outcome_wrong", "outcome_unparseable", "outcome_timeout", "outcome_error"),
          ("right", "wrong", "unparseable", "timeout", "error"), share=True, stacked=True,
          colours=(GREEN, RED, VIOLET, ORANGE, GREY)),
    Chart("Seconds by phase", "wall time of a step",
          ("seconds_sync", "seconds_generate", "seconds_score", "seconds_logprobs", "seconds_update"),
          ("refresh", "generate", "score", "log-probs", "update"), stacked=True,
          colours=(GREY, BLUE, ORANGE, GREEN, VIOLET)),
)  # fmt: skip


def plotly_js() -> str:
    """The plotting library itself, to be put into the page once."""
    return plotly.offline.get_plotlyjs()


def stage_charts(stage: StageRecord, prefix: str) -> tuple[list[str], list[str]]:
    """The charts of one stage as HTML figures: the main ones, and one for every metric that no chart has claimed.

    Args:
        stage: the stage.
        prefix: of the figures' ids; a plain word, different for every stage of the page.
    """
    present = dict.fromkeys(key for row in stage.metrics for key in row if key not in _HIDDEN)
    main, claimed = [], set[str]()
    for chart in CHARTS:
        if any(key in present for key in chart.keys):
            claimed.update(chart.keys)
            main.append(_figure(chart, stage, f"{prefix}-{len(main)}"))
        sources = tuple(key for key in present if key.startswith(f"{chart.keys[0]}/"))
        if chart.keys[0] in BY_SOURCE and sources:
            claimed.update(sources)
            if not _repeats(stage.metrics, sources, chart.keys[0]):
                main.append(_figure(_by_source(chart, sources), stage, f"{prefix}-{len(main)}"))
    rest = [key for key in present if key not in claimed]
    more = [_figure(Chart(key, "", (key,)), stage, f"{prefix}-more-{i}") for i, key in enumerate(rest)]
    return main, more


def _by_source(chart: Chart, sources: tuple[str, ...]) -> Chart:
    labels = tuple(key.split("/", 1)[1] for key in sources)
    return Chart(f"{chart.title} by source", "of the data mixture", sources, labels, chart.share)


def _repeats(metrics: Sequence[Mapping[str, float]], sources: Sequence[str], whole: str) -> bool:
    """Whether there is one source only and its curve is that of the whole."""
    return len(sources) == 1 and all(row.get(sources[0]) == row.get(whole) for row in metrics)


def score_chart(stages: Sequence[StageRecord]) -> str:
    """Accuracy before and after every stage with its interval; empty where nothing was scored."""
    scored = [stage for stage in stages if stage.before or stage.after]
    if not scored:
        return ""
    figure = go.Figure()
    rows = [(len(scored) - i, stage) for i, stage in enumerate(scored)]
    before = [(y + 0.13, stage.before) for y, stage in rows if stage.before]
    after = [(y - 0.13, stage.after) for y, stage in rows if stage.after]
    for points, name, colour, symbol in ((before, "before", GREY, "circle-open"), (after, "after", BLUE, "circle")):
        figure.add_trace(_interval_trace(points, name, colour, symbol))
    figure.update_layout(**layout(height=70 + 62 * len(scored)), hovermode="closest")
    ticks = {"tickvals": [y for y, _ in rows], "ticktext": [html.escape(stage.name) for _, stage in rows]}
    figure.update_layout(
        yaxis={**ticks, "range": [0.4, len(scored) + 0.6], "showgrid": False, "tickfont": {"size": 14}}
    )
    figure.update_layout(xaxis={"tickformat": ".0%", "rangemode": "tozero", "showgrid": True})
    keys = legend(("before", "after"), (GREY, BLUE))
    return wrap("Before and after each stage", "", keys, figure, "scores-chart")


def _interval_trace(points: Sequence[tuple[float, Scores]], name: str, colour: str, symbol: str) -> go.Scatter:
    arms = [
        ((s.high or s.accuracy) - s.accuracy, s.accuracy - (s.accuracy if s.low is None else s.low)) for _, s in points
    ]
    return go.Scatter(
        x=[s.accuracy for _, s in points],
        y=[y for y, _ in points],
        error_x={"array": [a for a, _ in arms], "arrayminus": [b for _, b in arms], "thickness": 2, "width": 0},
        mode="markers+text",
        text=[f"{100 * s.accuracy:.1f}%" for _, s in points],
        textposition="top center" if name == "before" else "bottom center",
        marker={"size": 11, "color": colour, "symbol": symbol, "line": {"width": 2, "color": colour}},
        name=name,
        cliponaxis=False,
        hovertemplate="%{x:.1%}<extra>" + name + "</extra>",
    )


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


def _series(metrics: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float], list[float]]:
    """Steps, values and smoothed values of one metric, thinned to what a small chart can show."""
    points = [(row["step"], row[key]) for row in metrics if key in row]
    line = smooth([value for _, value in points])
    stride = -(-len(points) // MAX_POINTS) or 1
    steps, values = [s for s, _ in points], [v for _, v in points]
    return steps[::stride], values[::stride], line[::stride]


def _figure(chart: Chart, stage: StageRecord, name: str) -> str:
    figure = go.Figure()
    present = [i for i, key in enumerate(chart.keys) if any(key in row for row in stage.metrics)]
    labels = tuple((chart.labels or chart.keys)[i] for i in present)
    colours = tuple(chart.colours[i % len(chart.colours)] for i in present)
    number = ":.1%" if chart.share else ":.4g"
    for i, label, colour in zip(present, labels, colours, strict=True):
        steps, values, line = _series(stage.metrics, chart.keys[i])
        # plotly reads a little HTML in names; a label may come from a file.
        text = html.escape(label)
        hover = f"%{{y{number}}}<extra>{text if chart.labels else ''}</extra>"
        if chart.stacked:
            figure.add_trace(_band(steps, values, text, colour, chart.share, hover))
            continue
        dots = {"size": 4 if len(steps) > 30 else 5, "color": colour, "opacity": 0.45}
        figure.add_trace(go.Scatter(x=steps, y=values, mode="markers", marker=dots, name=text, hovertemplate=hover))
        stroke = {"width": 2, "color": colour}
        figure.add_trace(go.Scatter(x=steps, y=line, mode="lines", line=stroke, name=text, hoverinfo="skip"))
    figure.update_layout(**layout(height=200), hovermode="x unified")
    figure.update_yaxes(tickformat=".3~p" if chart.share else "~g")
    if chart.share:
        # A curve that is 0 all along would be given an axis beyond what a share can be; 0.03 is room for the dots.
        figure.update_yaxes(autorangeoptions={"clipmin": -0.03, "clipmax": 1.03})
    if len(stage.metrics) <= FEW_STEPS:
        figure.update_xaxes(dtick=1)  # there is no step and a half
    if chart.stacked:
        figure.update_layout(yaxis={"range": [0, 1]} if chart.share else {"rangemode": "tozero"})
    return wrap(chart.title, chart.note, legend(labels, colours) if chart.labels else "", figure, name)


def _band(steps: list[float], values: list[float], text: str, colour: str, share: bool, hover: str) -> go.Scatter:
    shape = {"groupnorm": "fraction"} if share else {}
    # A single step has no area to fill: show it as a point.
    mode = "lines" if len(steps) > 1 else "markers"
    return go.Scatter(
        x=steps,
        y=values,
        mode=mode,
        stackgroup="all",
        name=text,
        hovertemplate=hover,
        line={"width": 0.5, "color": colour},
        fillcolor=_clear(colour),
        marker={"color": colour},
        **shape,
    )


def _clear(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.75)"
