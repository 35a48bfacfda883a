"""`tulu report RUN`: a run as one HTML page that needs no network.

The page shows whatever the run folder holds: what is missing is left out or said to be missing.
"""

import argparse
import contextlib
import html
import importlib.util
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tulu_lightning.errors import InputError
from tulu_lightning.recipes.records import Rollout, RunRecord, StageRecord, read_run
from tulu_lightning.recipes.report_style import SCRIPT, STYLE
from tulu_lightning.recipes.table import (
    FIGURES,
    HEADINGS,
    Cell,
    count,
    duration,
    pairs_made,
    progress,
    score_rows,
    what_is_scored,
)

SHOWN_ROLLOUTS = 10
MARKS = {"right": "✓", "wrong": "✗", "unparseable": "?", "timeout": "…", "error": "!"}

# The browser itself holds the page to its word: nothing is fetched, whatever a model may have written.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def main(argv: Sequence[str] | None = None) -> int:
    """`tulu report RUN [--output FILE]`: writes the page and prints its path.

    Raises:
        InputError: RUN is not a run folder, the output cannot be written, or plotly is not installed.
    """
    parser = argparse.ArgumentParser(prog="tulu report", description="Write a run as one self-contained HTML page.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run or of one stage, e.g. runs/smol")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write it; RUN/report.html by default")
    args = parser.parse_args(argv)
    print(write_report(args.run, args.output))
    return 0


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Writes the report of a run and returns its path.

    Args:
        run_dir: the run folder, finished or not.
        output: the file to write; `run_dir/report.html` by default.

    Raises:
        InputError: `run_dir` is not a run folder, `output` cannot be written, or plotly is not installed.
    """
    run = read_run(run_dir)
    if importlib.util.find_spec("plotly") is None:
        raise InputError("tulu report", "plotly is not installed", "Install it: pip install 'tulu-lightning[demo]'.")
    output = output or run_dir / "report.html"
    part = output.with_name(f"{output.name}.part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(render(run), encoding="utf-8", errors="replace")  # JSON may hold lone surrogates
        os.replace(part, output)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(
            str(output), f"cannot be written ({error.strerror})", "Give a file that can, with --output."
        ) from error
    return output


def render(run: RunRecord) -> str:
    """The whole page."""
    from tulu_lightning.recipes import report_charts, report_lengths  # need plotly, which write_report asks for first

    sections = [
        _header(run),
        _notes(run),
        _scores(run, report_charts.score_chart(run.stages)),
        _curves(
            [
                (
                    stage,
                    *report_charts.stage_charts(stage, f"s{i}"),
                    report_lengths.length_section(stage, f"s{i}-length"),
                )
                for i, stage in enumerate(run.stages)
            ]
        ),
        _rollouts(run.rollouts),
        _configs(run.stages),
        _origin(run),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{_e(run.name)} · run report</title>
<style>{STYLE}</style>
<script>{report_charts.plotly_js()}</script>
</head>
<body><main>
{"".join(sections)}
<footer>Written by <code>tulu report</code>. This page loads nothing from the network.</footer>
</main><script>{SCRIPT}</script></body>
</html>
"""


def _e(value: object) -> str:
    return html.escape(str(value))


def _header(run: RunRecord) -> str:
    seconds = [s for stage in run.stages if (s := stage.total("seconds")) is not None]
    tokens = [t for stage in run.stages if (t := stage.total("tokens")) is not None]
    facts = [
        " → ".join(stage.name for stage in run.stages),
        duration(sum(seconds)) if seconds else "",
        f"{count(sum(tokens))} tokens" if tokens else "",
        f"started {_moment(run.created)}" if run.created else "",
    ]
    links = ("scores", "curves", "rollouts", "configs", "versions")
    return f"""<h1>{_e(run.name)}</h1>
<p class="lead">{_e(" · ".join(fact for fact in facts if fact))}</p>
<div class="tiles">{"".join(_tile(stage) for stage in run.stages)}</div>
<nav aria-label="Sections">{"".join(f'<a href="#{name}">{name.capitalize()}</a>' for name in links)}</nav>"""


def _moment(iso: str) -> str:
    try:
        return f"{datetime.fromisoformat(iso):%Y-%m-%d %H:%M %Z}".strip()
    except ValueError:
        return iso


def _tile(stage: StageRecord) -> str:
    if stage.after is not None:
        figure = f"{100 * stage.after.accuracy:.1f}%"
    elif made := pairs_made(stage):
        figure = " ".join(made.split()[:2])
    else:
        figure = "–"
    detail = [f"from {100 * stage.before.accuracy:.1f}%"] if stage.before is not None else []
    detail = [_e(text) for text in detail]
    if stage.decision is not None and (points := stage.decision.difference) is not None:
        detail.append(f'<span class="{"up" if points > 0 else "down"}">{100 * points:+.1f} points</span>')
    return f"""<div class="tile"><header>{_e(stage.name)}
<span class="chip {stage.status.replace(" ", "-")}">{_e(progress(stage))}</span></header>
<strong>{_e(figure)}</strong><span class="detail">{" · ".join(detail) or "&nbsp;"}</span></div>"""


def _notes(run: RunRecord) -> str:
    if not run.notes:
        return ""
    items = "".join(f"<li>{_e(note)}</li>" for note in run.notes)
    return f'<div class="notes"><b>To know before reading on</b><ul>{items}</ul></div>'


def _scores(run: RunRecord, chart: str) -> str:
    head = "".join(f'<th scope="col"{_figure_class(h)}>{h}</th>' for h in HEADINGS)
    rows = "".join(f"<tr>{_row(cells)}</tr>" for cells in score_rows(run))
    return f"""<h2 id="scores">Scores</h2>
<p class="lead">{_e(what_is_scored(run).capitalize())}. The difference is paired by prompt.</p>
{chart}
<div class="card" style="margin-top:12px"><table class="scores">
<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"""


def _row(cells: tuple[Cell, ...]) -> str:
    out = []
    for heading, cell in zip(HEADINGS, cells, strict=True):
        detail = f'<span class="detail">{_e(cell.detail)}</span>' if cell.detail else ""
        if heading == "Stage":
            out.append(f'<th scope="row">{_e(cell.text)}{detail}</th>')
        else:
            out.append(f'<td data-label="{heading}"{_figure_class(heading)}><span>{_e(cell.text)}{detail}</span></td>')
    return "".join(out)


def _figure_class(heading: str) -> str:
    return ' class="n"' if heading in FIGURES else ""


def _curves(stages: Sequence[tuple[StageRecord, list[str], list[str], str]]) -> str:
    parts = [
        '<h2 id="curves">Curves</h2><p class="lead">Dots are steps; the line is their trend (local linear fit).</p>'
    ]
    for stage, main, more, lengths in stages:
        without_steps = not stage.metrics and stage.summary is not None  # such as making pairs
        if without_steps and not lengths:
            continue
        parts.append(f"<h3>{_e(stage.name)} <small>{_e(progress(stage))}</small></h3>")
        if not stage.metrics and not without_steps:
            parts.append('<p class="empty">No step has been recorded.</p>')
        parts.append(f'<div class="charts">{"".join(main)}</div>' if main else "")
        parts.append(lengths)
        if more:
            box = f'<div class="charts">{"".join(more)}</div>'
            parts.append(
                f'<details style="margin-top:12px"><summary>{len(more)} more metrics of {_e(stage.name)}</summary>{box}</details>'
            )
    return "".join(parts)


def pick_rollouts(rollouts: Sequence[Rollout], n: int = SHOWN_ROLLOUTS) -> list[Rollout]:
    """`n` rollouts spread evenly from the first step to the last, right and not right in turn, in step order."""
    left = list(rollouts)
    if len(left) <= n:
        return sorted(left, key=lambda r: r.step)
    first, last = min(r.step for r in left), max(r.step for r in left)
    moments = -(-n // 2)  # at each of them one that is right, one that is not
    chosen: list[Rollout] = []
    for i in range(n):
        target = first + (last - first) * (i // 2) / max(moments - 1, 1)
        # The other kind only where this kind has run out.
        best = min(left, key=lambda r, i=i, t=target: ((r.outcome == "right") != (i % 2 == 0), abs(r.step - t)))
        left.remove(best)
        chosen.append(best)
    return sorted(chosen, key=lambda r: r.step)


def _rollouts(rollouts: Sequence[Rollout]) -> str:
    stages = list(dict.fromkeys(rollout.stage for rollout in rollouts))
    body = ""
    for stage in stages:
        chosen = pick_rollouts([rollout for rollout in rollouts if rollout.stage == stage])
        title = f"<h3>{_e(stage)}</h3>" if len(stages) > 1 else ""
        body += f'{title}<div class="rollouts">{"".join(map(_rollout, chosen))}</div>'
    body = body or '<p class="empty">No rollout has been recorded.</p>'
    return f"""<h2 id="rollouts">Sample rollouts</h2>
<p class="lead">Responses sampled in training, from the first step to the last, with the verifier's verdict.</p>{body}"""


def _rollout(rollout: Rollout) -> str:
    known = rollout.outcome in MARKS
    facts = [
        f"score {rollout.score:g}" if rollout.score is not None else "",
        f"reward {rollout.reward:.4g}" if rollout.reward is not None else "",
        f"advantage {rollout.advantage:+.2f}" if rollout.advantage is not None else "",
        f"{rollout.tokens} tokens" if rollout.tokens is not None else "",
        f"finish: {rollout.finish}" if rollout.finish else "",
    ]
    response = _e(rollout.response) if rollout.response else '<span class="empty">(empty)</span>'
    return f"""<article class="card rollout {rollout.outcome if known else ""}">
<header><b>{MARKS.get(rollout.outcome, "·")} {_e(rollout.outcome or "no verdict")}</b><span>step {rollout.step}</span>
<span class="facts">{_e(" · ".join(fact for fact in facts if fact))}</span></header>
<div class="label">Prompt</div><pre class="said">{_e(rollout.prompt)}</pre>
<div class="label">Response</div><pre class="said">{response}</pre></article>"""


def _configs(stages: Sequence[StageRecord]) -> str:
    boxes = []
    for stage in stages:
        start = (stage.summary or {}).get("start")
        origin = f" <small>started from {_e(start)}</small>" if start else ""
        if stage.config is not None:
            boxes.append(f"<details><summary>{_e(stage.name)}{origin}</summary><pre>{_e(stage.config)}</pre></details>")
    body = "".join(boxes) or '<p class="empty">No config has been recorded.</p>'
    return f'<h2 id="configs">Resolved configs</h2>{body}'


def _origin(run: RunRecord) -> str:
    command = f'<p class="lead">Command: <code>{_e(run.command)}</code></p>' if run.command else ""
    tables = _facts_table("Versions", run.versions) + _facts_table("Seeds", run.seeds)
    body = f'<div class="pair">{tables}</div>' if tables else '<p class="empty">None has been recorded.</p>'
    return f'<h2 id="versions">Versions and seeds</h2>{command}{body}'


def _facts_table(title: str, facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    rows = "".join(f'<tr><th scope="row">{_e(key)}</th><td>{_e(value)}</td></tr>' for key, value in facts.items())
    return f'<div class="card"><table class="facts-table" aria-label="{title}"><tbody>{rows}</tbody></table></div>'
