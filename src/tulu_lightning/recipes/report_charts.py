"""The report's curves: which metrics share a chart, and the charts themselves, by plotly."""

import html
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import plotly.offline

from tulu_lightning.core.promotion import HELD_OUT
from tulu_lightning.recipes.records import Scores, StageRecord
from tulu_lightning.recipes.report_curves import Chart, Other, draw
from tulu_lightning.recipes.report_figure import BLUE, GREEN, GREY, ORANGE, RED, VIOLET, layout, legend, wrap
from tulu_lightning.recipes.report_tasks import moments_of, tasks_of

__all__ = ["CHARTS", "plotly_js", "score_chart", "score_curves", "stage_charts"]

BY_SOURCE = ("loss", "margin", "accuracy")
"""Metrics of which a stage may record `name/source` as well."""
_HIDDEN = {"step", "time", "stage"}
HELD = "val_"
"""What the metrics of a validation are named with."""


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
    Chart("Rewards of the pairs", "a reward model's; else implicit: β times the log-ratio to the reference, if there is one",
          ("rewards_chosen", "rewards_rejected"), *SIDES),
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
          ("seconds_sync", "seconds_generate", "seconds_score", "seconds_logprobs", "seconds_update", "seconds_wait"),
          ("refresh", "generate", "score", "log-probs", "update", "wait"), stacked=True,
          colours=(GREY, BLUE, ORANGE, GREEN, VIOLET, RED)),
    Chart("Peak memory", "GiB, the most that the process has held so far", ("peak_memory_bytes",), scale=2.0**-30),
)  # fmt: skip


def plotly_js() -> str:
    """The plotting library itself, to be put into the page once."""
    return plotly.offline.get_plotlyjs()


def stage_charts(stage: StageRecord, prefix: str, other: Other | None = None) -> tuple[list[str], list[str]]:
    """The charts of one stage as HTML figures: the main ones, and one for every metric that no chart has claimed.

    Args:
        stage: the stage.
        prefix: of the figures' ids; a plain word, different for every stage of the page.
        other: the same stage of a second run, drawn beside.
    """
    rows = [*stage.metrics, *(other.stage.metrics if other else ())]
    present = dict.fromkeys(key for row in rows for key in row if key not in _HIDDEN)
    main, claimed = list[str](), set[str]()
    for chart in CHARTS:
        if any(key in present for key in chart.keys):
            claimed.update(chart.keys)
            main += _drawn(chart, stage, f"{prefix}-{len(main)}", other)
        sources = tuple(key for key in present if key.startswith(f"{chart.keys[0]}/"))
        if chart.keys[0] in BY_SOURCE and sources:
            claimed.update(sources)
            if not _repeats(rows, sources, chart.keys[0]):
                main += _drawn(_by_source(chart, sources), stage, f"{prefix}-{len(main)}", other)
    claimed.update(f"{HELD}{key}" for key in present)
    rest = _rest(rows, [key for key in present if key not in claimed])
    held = dict.fromkeys(key for row in stage.validation for key in row if key.startswith(HELD) and key not in claimed)
    rest += [Chart(key.removeprefix(HELD), "", (key.removeprefix(HELD),)) for key in held]
    return main, [draw(chart, stage, f"{prefix}-more-{i}", other) for i, chart in enumerate(rest)]


def _drawn(chart: Chart, stage: StageRecord, name: str, other: Other | None) -> list[str]:
    """One figure; of a stacked chart one a run, since two stacks on one pair of axes cannot be read."""
    if other is None or not chart.stacked:
        return [draw(chart, stage, name, other)]
    records = zip(other.names, (stage, other.stage), strict=True)
    return [
        draw(chart._replace(note=f"{chart.note}; {run}"), record, f"{name}-{i}")
        for i, (run, record) in enumerate(records)
        if any(key in row for row in record.metrics for key in chart.keys)
    ]


def _by_source(chart: Chart, sources: tuple[str, ...]) -> Chart:
    labels = tuple(key.split("/", 1)[1] for key in sources)
    return Chart(f"{chart.title} by source", "of the data mixture", sources, labels, chart.share)


def _rest(rows: Sequence[Mapping[str, float]], keys: Sequence[str]) -> list[Chart]:
    """A plain chart for each metric; what is recorded by source (`name/source`) shares one."""
    groups: dict[tuple[str, str], tuple[str, ...]] = {}
    for key in keys:
        name, slash, _ = key.partition("/")
        groups[name, slash] = (*groups.get((name, slash), ()), key)
    return [
        _by_source(Chart(name, "", (name,)), own) if slash else Chart(name, "", own)
        for (name, slash), own in groups.items()
        if not (slash and _repeats(rows, own, name))
    ]


def _repeats(metrics: Sequence[Mapping[str, float]], sources: Sequence[str], whole: str) -> bool:
    """Whether there is one source only and its curve is that of the whole."""
    return len(sources) == 1 and all(row.get(sources[0]) == row.get(whole) for row in metrics)


def score_chart(stages: Sequence[StageRecord]) -> str:
    """Score before and after every stage, on the task that decides, with its interval; empty where nothing was scored."""
    scored = [(stage, *stage.ends) for stage in stages if any(stage.ends)]
    if not scored:
        return ""
    figure = go.Figure()
    rows = [(len(scored) - i, *one) for i, one in enumerate(scored)]
    before = [(y + 0.13, scores) for y, _, scores, _ in rows if scores]
    after = [(y - 0.13, scores) for y, _, _, scores in rows if scores]
    for points, name, colour, symbol in ((before, "before", GREY, "circle-open"), (after, "after", BLUE, "circle")):
        figure.add_trace(_interval_trace(points, name, colour, symbol))
    figure.update_layout(**layout(height=70 + 62 * len(scored)), hovermode="closest")
    ticks = {"tickvals": [y for y, *_ in rows], "ticktext": [html.escape(_scored_on(stage)) for _, stage, *_ in rows]}
    figure.update_layout(
        yaxis={**ticks, "range": [0.4, len(scored) + 0.6], "showgrid": False, "tickfont": {"size": 14}}
    )
    figure.update_layout(xaxis={"tickformat": ".0%", "rangemode": "tozero", "showgrid": True})
    keys = legend(("before", "after"), (GREY, BLUE))
    return wrap("Before and after each stage", "", keys, figure, "scores-chart")


def _scored_on(stage: StageRecord) -> str:
    return stage.name if stage.decided_by == HELD_OUT else f"{stage.name}, {stage.decided_by}"


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


def score_curves(stage: StageRecord, prefix: str, other: Other | None = None) -> list[str]:
    """The held-out score, and that of every task, over the steps with intervals; those that were scored in between.

    Args:
        stage: the stage.
        prefix: of the figures' ids; a plain word, different for every stage of the page.
        other: the same stage of a second run, drawn beside.
    """
    figures = []
    for task in dict.fromkeys([HELD_OUT, *tasks_of(stage), *(tasks_of(other.stage) if other else ())]):
        if figure := _score_curve(task, stage, f"{prefix}-{len(figures)}", other):
            figures.append(figure)
    return figures


def _score_curve(task: str, stage: StageRecord, name: str, other: Other | None) -> str:
    runs = [(stage, other.names[0] if other else "", BLUE), *([(other.stage, other.names[1], VIOLET)] if other else [])]
    figure = go.Figure()
    drawn: dict[str, str] = {}
    for record, label, colour in runs:
        moments = moments_of(record, task)
        if len(moments) > 2 or (other and len(moments) > 1):
            figure.add_trace(_over_steps(moments, html.escape(label), colour))
            drawn[label] = colour
    if not drawn:
        return ""
    figure.update_layout(**layout(height=200), hovermode="x unified")
    figure.update_yaxes(tickformat=".3~p", autorangeoptions={"clipmin": -0.03, "clipmax": 1.03})
    keys = legend(tuple(drawn), tuple(drawn.values())) if other else ""
    title = "Held-out score" if task == HELD_OUT else f"Score on {task}"
    return wrap(title, "mean over the items, with 95% intervals", keys, figure, name)


def _over_steps(moments: Sequence[tuple[int, Scores]], label: str, colour: str) -> go.Scatter:
    scores = [s for _, s in moments]
    return go.Scatter(
        x=[step for step, _ in moments],
        y=[s.accuracy for s in scores],
        error_y={
            "array": [(s.accuracy if s.high is None else s.high) - s.accuracy for s in scores],
            "arrayminus": [s.accuracy - (s.accuracy if s.low is None else s.low) for s in scores],
            "thickness": 1.5,
            "width": 0,
        },
        mode="lines+markers",
        line={"width": 2, "color": colour},
        marker={"size": 8, "color": colour},
        customdata=[[s.low or 0.0, s.high or 0.0, s.n or 0] for s in scores],
        hovertemplate="%{y:.1%} [%{customdata[0]:.1%}, %{customdata[1]:.1%}], n = %{customdata[2]}"
        f"<extra>{label}</extra>",
        name=label,
    )
