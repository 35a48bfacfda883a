"""The report's part on response length: the held-out score by length, and how long answers and pairs are."""

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import plotly.graph_objects as go

from tulu_lightning.evaluation.by_length import BucketScore, by_length, length_buckets, length_change
from tulu_lightning.recipes.pair_lengths import PairLengths
from tulu_lightning.recipes.records import Scores, StageRecord
from tulu_lightning.recipes.report_figure import BLUE, GREY, layout, legend, wrap

__all__ = ["length_chart", "length_facts", "length_section"]

APART = 0.16
"""Of before and after from the middle of their bucket, where buckets are 1 apart."""


class Moment(NamedTuple):
    """How the answers of one moment are drawn."""

    when: str
    colour: str
    symbol: str
    beside: float
    """Of the middle of their bucket."""


BEFORE, AFTER = Moment("before", GREY, "circle-open", -APART), Moment("after", BLUE, "circle", APART)


def length_section(stage: StageRecord, name: str) -> str:
    """Chart and table side by side; empty where the stage has neither.

    Args:
        stage: the stage.
        name: of the figure; a plain word, different for every stage of the page.
    """
    chart, facts = length_chart(stage, name), length_facts(stage)
    rows = "".join(f'<tr><th scope="row">{key}</th><td>{html.escape(value)}</td></tr>' for key, value in facts.items())
    table = f'<table class="facts-table" aria-label="Lengths"><tbody>{rows}</tbody></table>'
    card = f'<div class="card">{table}</div>' if facts else ""
    return f'<div class="lengths">{chart}{card}</div>' if chart or card else ""


def length_chart(stage: StageRecord, name: str) -> str:
    """Held-out score by response length before and after, over the number of answers; empty where none is recorded."""
    moments = [(moment, s.answers) for moment, s in ((BEFORE, stage.before), (AFTER, stage.after)) if s and s.answers]
    if not moments:
        return ""
    # One set of buckets for both moments, or their points would not compare.
    buckets = length_buckets(answer.tokens for _, answers in moments for answer in answers)
    figure = go.Figure()
    for moment, answers in moments:
        figure.add_traces(_traces(by_length(answers, buckets), moment))
    look = layout(height=330)
    look["xaxis"] |= {
        "tickvals": list(range(len(buckets))),
        "ticktext": [str(bucket) for bucket in buckets],
        "range": [-0.5, len(buckets) - 0.5],
        "anchor": "y2",
        "title": {"text": "tokens of the response", "standoff": 8, "font": {"size": 12}},
    }
    score = look["yaxis"] | {
        "domain": [0.42, 1],
        "tickformat": ".0%",
        "range": [-0.03, 1.03],
        "title": {"text": "score", "font": {"size": 12}},
    }
    count = look["yaxis"] | {
        "domain": [0, 0.3],
        "nticks": 3,
        "rangemode": "tozero",
        "title": {"text": "answers", "font": {"size": 12}},
    }
    figure.update_layout(**{**look, "yaxis": score, "yaxis2": count}, barmode="overlay", hovermode="closest")
    keys = legend([moment.when for moment, _ in moments], [moment.colour for moment, _ in moments])
    note = "with 95% intervals; below, how many answers are that long"
    return wrap("Held-out score by response length", note, keys, figure, name)


def _traces(scores: Sequence[BucketScore], moment: Moment) -> tuple[go.Scatter, go.Bar]:
    """The scores of one moment as points with intervals, and the number of its answers as bars under them."""
    shown = [(place + moment.beside, s, s.score) for place, s in enumerate(scores) if s.score is not None]
    points = go.Scatter(
        x=[x for x, _, _ in shown],
        y=[score for _, _, score in shown],
        error_y={
            "array": [s.high - score for _, s, score in shown],
            "arrayminus": [score - s.low for _, s, score in shown],
            "thickness": 2,
            "width": 0,
        },
        mode="markers",
        marker={
            "size": 9,
            "color": moment.colour,
            "symbol": moment.symbol,
            "line": {"width": 2, "color": moment.colour},
        },
        customdata=[[str(s.bucket), s.n, s.low, s.high] for _, s, _ in shown],
        hovertemplate="%{customdata[0]} tokens: %{y:.1%} [%{customdata[2]:.1%}, %{customdata[3]:.1%}], "
        "n = %{customdata[1]}<extra>" + moment.when + "</extra>",
        name=moment.when,
    )
    bars = go.Bar(
        x=[place + moment.beside for place in range(len(scores))],
        y=[s.n for s in scores],
        width=1.7 * APART,
        marker={"color": moment.colour, "opacity": 0.75},
        customdata=[str(s.bucket) for s in scores],
        hovertemplate="%{customdata} tokens: %{y} answers<extra>" + moment.when + "</extra>",
        name=moment.when,
        yaxis="y2",
    )
    return points, bars


def length_facts(stage: StageRecord) -> dict[str, str]:
    """What the table says: the lengths of the pairs that were made or trained on, and of the held-out answers."""
    facts = {}
    if made := stage.pair_lengths:
        facts |= _made(made)
    chosen, rejected = (_trained(stage.metrics, f"length_{side}") for side in ("chosen", "rejected"))
    if chosen is not None and rejected is not None:
        facts["Pairs trained on"] = f"mean tokens {chosen:.1f} chosen, {rejected:.1f} rejected"
    if held_out := _held_out(stage.before, stage.after):
        facts["Held-out answers"] = held_out
    if cut := _cut(stage.before, stage.after):
        facts["Cut at the limit"] = cut
    return facts


def _made(made: PairLengths) -> dict[str, str]:
    equal = 1 - made.chosen_longer - made.rejected_longer
    return {
        "Pairs made": f"{made.pairs:,}",
        "Mean tokens": f"{made.chosen:.1f} chosen, {made.rejected:.1f} rejected",
        "Longer side": f"chosen in {made.chosen_longer:.0%} of the pairs, rejected in {made.rejected_longer:.0%}, "
        f"neither in {equal:.0%}",
    }


def _trained(metrics: Sequence[Mapping[str, float]], key: str) -> float | None:
    """Mean over the pairs of all steps; steps count alike where their numbers of pairs are not recorded."""
    rows = [(row[key], row.get("pairs", 1.0)) for row in metrics if key in row]
    pairs = sum(weight for _, weight in rows)
    return sum(value * weight for value, weight in rows) / pairs if pairs else None


def _held_out(before: Scores | None, after: Scores | None) -> str:
    means = [(s.mean_tokens, when) for s, when in ((before, "before"), (after, "after")) if s is not None]
    said = ", ".join(f"{mean:.1f} {when}" for mean, when in means if mean is not None)
    if not said:
        return ""
    if not (before and after and before.answers and _same_prompts(before, after)):
        return f"mean tokens {said}"
    difference, low, high = length_change(before.answers, after.answers)
    return f"mean tokens {said}: {difference:+.1f}, 95% interval {low:+.1f} to {high:+.1f}"


def _same_prompts(before: Scores, after: Scores) -> bool:
    return before.settings_hash == after.settings_hash and len(before.answers) == len(after.answers)


def _cut(before: Scores | None, after: Scores | None) -> str:
    moments = [(s.answers, when) for s, when in ((before, "before"), (after, "after")) if s is not None and s.answers]
    if not any(answer.cut for answers, _ in moments for answer in answers):
        return ""
    return ", ".join(f"{sum(a.cut for a in answers)} of {len(answers)} {when}" for answers, when in moments)
