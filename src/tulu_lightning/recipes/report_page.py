"""The page of the report: its sections in order, and those that have no file of their own."""

from collections.abc import Sequence
from datetime import datetime

from tulu_lightning.core.promotion import HELD_OUT
from tulu_lightning.recipes.records import RunRecord, StageRecord
from tulu_lightning.recipes.report_alerts import alerts_section, find_alerts
from tulu_lightning.recipes.report_changes import changes_table, from_files
from tulu_lightning.recipes.report_charts import plotly_js, score_chart, score_curves, stage_charts
from tulu_lightning.recipes.report_compare import Pairing, comparison, pairing
from tulu_lightning.recipes.report_cost import cost_section
from tulu_lightning.recipes.report_data import data_part
from tulu_lightning.recipes.report_lengths import length_section
from tulu_lightning.recipes.report_parts import cell_table, escape, facts_table
from tulu_lightning.recipes.report_promotions import decisions_table
from tulu_lightning.recipes.report_rollouts import rollouts_section
from tulu_lightning.recipes.report_samples import samples_of
from tulu_lightning.recipes.report_style import SCRIPT, STYLE
from tulu_lightning.recipes.report_tasks import task_table
from tulu_lightning.recipes.table import (
    HEADINGS,
    count,
    duration,
    gain,
    pairs_made,
    progress,
    score_rows,
    what_is_scored,
)

__all__ = ["page"]

SECTIONS = {
    "alerts": "Alerts",
    "compared": "Compared",
    "scores": "Scores",
    "curves": "Curves",
    "samples": "Samples",
    "rollouts": "Rollouts",
    "cost": "Time and memory",
    "data": "Data",
    "configs": "Configs",
    "versions": "Versions",
}
"""Ids of the sections and what the links to them say; a page has those that it has something for."""


def page(run: RunRecord, against: RunRecord | None, policy: str) -> str:
    """The whole page.

    Args:
        run: the run.
        against: a second one to compare it with.
        policy: its Content-Security-Policy.
    """
    beside = None if against is None else pairing(run, against)
    sections = [
        _notes(run, against),
        alerts_section(find_alerts(run.stages, [_anchor(i) for i in range(len(run.stages))])),
        "" if beside is None else comparison(beside),
        _scores(run),
        _curves(run.stages, beside),
        samples_of(run, against, beside.names if beside else ("", "")),
        rollouts_section(run.rollouts),
        cost_section(run.stages),
        _data(run.stages),
        _configs(run.stages),
        _origin(run),
    ]
    body = "".join(sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(_title(run, against))} · run report</title>
<style>{STYLE}</style>
<script>{plotly_js()}</script>
</head>
<body><main>
{_header(run, against, body)}{body}
<footer>Written by <code>tulu report</code>. This page loads nothing from the network.</footer>
</main><script>{SCRIPT}</script></body>
</html>
"""


def _title(run: RunRecord, against: RunRecord | None) -> str:
    return run.name if against is None else f"{run.name} against {against.name}"


def _header(run: RunRecord, against: RunRecord | None, body: str) -> str:
    seconds = [s for stage in run.stages if (s := stage.total("seconds")) is not None]
    tokens = [t for stage in run.stages if (t := stage.total("tokens")) is not None]
    facts = [
        " → ".join(stage.name for stage in run.stages),
        duration(sum(seconds)) if seconds else "",
        f"{count(sum(tokens))} tokens" if tokens else "",
        f"started {_moment(run.created)}" if run.created else "",
    ]
    links = [f'<a href="#{name}">{words}</a>' for name, words in SECTIONS.items() if f'<h2 id="{name}">' in body]
    versus = "" if against is None else f" <small>against {escape(against.name)}</small>"
    return f"""<h1>{escape(run.name)}{versus}</h1>
<p class="lead">{escape(" · ".join(fact for fact in facts if fact))}</p>
<div class="tiles">{"".join(_tile(stage) for stage in run.stages)}</div>
<nav aria-label="Sections">{"".join(links)}</nav>"""


def _moment(iso: str) -> str:
    try:
        return f"{datetime.fromisoformat(iso):%Y-%m-%d %H:%M %Z}".strip()
    except ValueError:
        return iso


def _tile(stage: StageRecord) -> str:
    figure, detail = "–", []
    (before, after), task = stage.ends, stage.decided_by
    began = [] if before is None else [f"from {100 * before.accuracy:.1f}%"]
    if after is not None:
        figure, detail = f"{100 * after.accuracy:.1f}%", [*([] if task == HELD_OUT else [task]), *began]
    elif made := pairs_made(stage):
        figure = " ".join(made.split()[:2])
    elif (found := _last_figure(stage)) is not None:
        figure, words = found
        detail = [words]
    else:
        detail = began
    detail = [escape(text) for text in detail]
    if (gained := gain(stage)) is not None:
        # Beside a figure that is not the task's score, points would pass for those of the figure.
        whose = "" if after is not None else f" on {'held-out prompts' if task == HELD_OUT else task or 'its scores'}"
        at = f", {gained.at}" if gained.at else ""
        told = escape(f"{100 * gained.difference:+.1f} points{whose}{at}")
        detail.append(f'<span class="{"up" if gained.difference > 0 else "down"}">{told}</span>')
    return f"""<div class="tile"><header>{escape(stage.name)}
<span class="chip {stage.status.replace(" ", "-")}">{escape(progress(stage))}</span></header>
<strong>{escape(figure)}</strong><span class="detail">{" · ".join(detail) or "&nbsp;"}</span></div>"""


def _last_figure(stage: StageRecord) -> tuple[str, str] | None:
    """For a stage without scores at its end: its pair accuracy on held-out rows, or its last loss."""
    for rows, key, words, share in (
        (stage.validation, "val_accuracy", "pair accuracy on held-out rows", True),
        (stage.metrics, "score", "verifier score, last step", True),
        (stage.metrics, "loss", "loss, last step", False),
    ):
        if found := [row[key] for row in rows if key in row]:
            return (f"{100 * found[-1]:.1f}%" if share else f"{found[-1]:.3g}"), words
    return None


def _notes(run: RunRecord, against: RunRecord | None) -> str:
    notes = list(run.notes)
    if against is not None:
        notes += [f"{against.name}: {note}" for note in against.notes]
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<div class="notes"><b>To know before reading on</b><ul>{items}</ul></div>'


def _scores(run: RunRecord) -> str:
    return f"""<h2 id="scores">Scores</h2>
<p class="lead">{escape(what_is_scored(run).capitalize())}. The difference is paired by item.</p>
{score_chart(run.stages)}
<div style="margin-top:12px">{cell_table(HEADINGS, score_rows(run), left=("Promoted",))}</div>
{task_table(run)}{decisions_table(run.stages)}"""


def _curves(stages: Sequence[StageRecord], beside: Pairing | None) -> str:
    lead = "Dots are steps; the line is their trend (local linear fit). Diamonds are validations on held-out rows."
    if beside:
        lead += f" Dotted lines are those of {escape(beside.names[1])}."
    parts = [f'<h2 id="curves">Curves</h2><p class="lead">{lead}</p>']
    for i, stage in enumerate(stages):
        other = None if beside is None else beside.other(stage)
        main, more = stage_charts(stage, f"s{i}", other)
        main = [*score_curves(stage, f"s{i}-scores", other), *main]
        lengths = length_section(stage, f"s{i}-length")
        without_steps = not stage.metrics and stage.summary is not None  # such as making pairs
        if without_steps and not lengths:
            continue
        parts.append(f'<h3 id="{_anchor(i)}">{escape(stage.name)} <small>{escape(progress(stage))}</small></h3>')
        if not stage.metrics and not without_steps:
            parts.append('<p class="empty">No step has been recorded.</p>')
        parts.append(f'<div class="charts">{"".join(main)}</div>' if main else "")
        parts.append(lengths)
        if more:
            title = f"{len(more)} more metrics of {escape(stage.name)}"
            parts.append(
                f'<details class="more"><summary>{title}</summary><div class="charts">{"".join(more)}</div></details>'
            )
    return "".join(parts)


def _anchor(place: int) -> str:
    """Id of the curves of a stage."""
    return f"curves-{place}"


def _data(stages: Sequence[StageRecord]) -> str:
    parts = [part for stage in stages if (part := data_part(stage))]
    if not parts:
        return ""
    lead = "Rows and tokens of every source, as the data manifest of each stage has them."
    return f'<h2 id="data">Data</h2><p class="lead">{lead}</p>{"".join(parts)}'


def _configs(stages: Sequence[StageRecord]) -> str:
    boxes = []
    for stage in stages:
        start = (stage.summary or {}).get("start")
        origin = f" <small>started from {escape(start)}</small>" if start else ""
        if stage.config is None:
            continue
        boxes.append(f"<h3>{escape(stage.name)}{origin}</h3>{_set_over(stage)}")
        boxes.append(f"<details><summary>The whole config</summary><pre>{escape(stage.config)}</pre></details>")
    body = "".join(boxes) or '<p class="empty">No config has been recorded.</p>'
    lead = "What the recipe or the command line set over the config files, and the whole that came of it."
    return f'<h2 id="configs">Configs</h2><p class="lead">{lead}</p>{body}'


def _set_over(stage: StageRecord) -> str:
    changes = from_files(stage)
    if changes is None:
        return ""
    named = (stage.origin or {}).get("files")
    last = f"<code>{escape(named[-1])}</code>" if isinstance(named, list) and named else "its config file"
    if not changes:
        return f'<p class="under">As {last} says.</p>'
    return f'<p class="under">Set over {last}:</p>{changes_table(changes, ("config files", "this run"))}'


def _origin(run: RunRecord) -> str:
    command = f'<p class="lead">Command: <code>{escape(run.command)}</code></p>' if run.command else ""
    facts = [("Versions", run.versions), ("Seeds", run.seeds)]
    tables = "".join(facts_table(title, [(k, escape(v)) for k, v in found.items()]) for title, found in facts)
    body = f'<div class="pair">{tables}</div>' if tables else '<p class="empty">None has been recorded.</p>'
    return f'<h2 id="versions">Versions and seeds</h2>{command}{body}'
