"""The same held-out prompts as every checkpoint of the run answered them, side by side."""

from collections.abc import Sequence
from typing import NamedTuple

from tulu_lightning.recipes.records import RunRecord, Scores
from tulu_lightning.recipes.report_parts import escape
from tulu_lightning.recipes.report_tasks import checkpoints, tasks_of
from tulu_lightning.recipes.score_records import Sample

__all__ = ["MARKS", "Column", "columns", "pick_prompts", "sampled_tasks", "samples_of", "samples_section"]

SHOWN = 8
OF_TASK = 4
OF_A_KIND = 3
"""Prompts with the same course of verdicts, at most."""
MARKS = {"right": "✓", "wrong": "✗", "unparseable": "?", "timeout": "…", "error": "!"}


class Column(NamedTuple):
    """The answers of one checkpoint."""

    name: str
    samples: tuple[Sample, ...]


def sampled_tasks(run: RunRecord) -> list[str]:
    """Tasks whose answers are kept: the held-out prompts first where there are any, as they are scored first."""
    return list(dict.fromkeys(task for each in checkpoints(run) for task, s in each.scores.items() if s.samples))


def columns(
    run: RunRecord, against: RunRecord | None = None, names: tuple[str, str] = ("", ""), task: str | None = None
) -> list[Column]:
    """Checkpoints that answered the same prompts under the same settings as the first of them.

    Args:
        run: the run, all of whose checkpoints are taken.
        against: a second run, of which only the last one is.
        names: what the two are called.
        task: one of `sampled_tasks`; the first of them by default.
    """
    task = task or next(iter(sampled_tasks(run)), "")
    found = _answered(run, task)
    if against is not None:
        found += [(f"{names[1]}: {name}", s) for name, s in _answered(against, task)[-1:]]
    return [Column(name, s.samples) for name, s in found if _same(found[0][1], s)]


def _answered(run: RunRecord, task: str) -> list[tuple[str, Scores]]:
    named = [(checkpoint.name, checkpoint.scores.get(task)) for checkpoint in checkpoints(run)]
    return [(name, scores) for name, scores in named if scores is not None and scores.samples]


def _same(first: Scores, other: Scores) -> bool:
    return first.settings_hash == other.settings_hash and [s.prompt for s in first.samples] == [
        s.prompt for s in other.samples
    ]


def pick_prompts(shown: Sequence[Column], n: int = SHOWN) -> list[int]:
    """Places of `n` prompts: one of each history of verdicts in turn, histories that change first, rare ones too.

    A history is what the checkpoints' verdicts were, one after the other; so what a stage gained and what it lost both
    appear, however rare. In the order of the prompts.
    """
    histories: dict[tuple[str, ...], list[int]] = {}
    for place in range(len(shown[0].samples)):
        histories.setdefault(tuple(column.samples[place].outcome for column in shown), []).append(place)
    order = sorted(histories.values(), key=lambda places: (not _changes(shown, places[0]), -len(places)))
    chosen: list[int] = []
    for turn in range(OF_A_KIND):
        for places in order:
            if turn < len(places) and len(chosen) < n:
                chosen.append(places[turn])
    return sorted(chosen)


def _changes(shown: Sequence[Column], place: int) -> bool:
    return len({column.samples[place].outcome for column in shown}) > 1


def samples_of(run: RunRecord, against: RunRecord | None = None, names: tuple[str, str] = ("", "")) -> str:
    """The section of a run, or of two; arguments as for `columns`."""
    suite = {task for stage in run.stages for task in tasks_of(stage)}
    tasks = sampled_tasks(run)
    held_out = next((task for task in tasks if task not in suite), None)
    others = [(task, columns(run, against, names, task)) for task in tasks if task in suite]
    return samples_section([] if held_out is None else columns(run, against, names, held_out), others)


def samples_section(shown: Sequence[Column], others: Sequence[tuple[str, Sequence[Column]]] = ()) -> str:
    """The section's body; empty where no prompts have the answers of two checkpoints.

    Args:
        shown: of the held-out prompts.
        others: of tasks, by name.
    """
    parts = [("held-out prompts", shown, SHOWN), *((f"items of {task}", each, OF_TASK) for task, each in others)]
    bodies = "".join(_cards(*part) for part in parts if len(part[1]) > 1)
    lead = (
        "As each checkpoint answered them. They are chosen so that every course of verdicts appears, changes first: their "
        "shares are not those of the whole."
    )
    return f'<h2 id="samples">Samples by stage</h2><p class="lead">{lead}</p>{bodies}' if bodies else ""


def _cards(what: str, shown: Sequence[Column], n: int) -> str:
    chosen = pick_prompts(shown, n)
    cards = "".join(_card(shown, place) for place in chosen)
    return f'<h3>{len(chosen)} of {len(shown[0].samples)} {escape(what)}</h3><div class="samples">{cards}</div>'


def _card(shown: Sequence[Column], place: int) -> str:
    first = shown[0].samples[place]
    target = f'<span class="facts">expected: {escape(_short(first.target))}</span>' if first.target else ""
    answers = "".join(_answer(column.name, column.samples[place]) for column in shown)
    return f"""<article class="card sample"><pre class="said">{escape(first.prompt)}</pre>{target}
<div class="answers">{answers}</div></article>"""


def _answer(name: str, sample: Sample) -> str:
    kind = sample.outcome if sample.outcome in MARKS else ""
    said = escape(sample.response) if sample.response else '<span class="empty">(empty)</span>'
    verdict = f"{MARKS.get(sample.outcome, '·')} {escape(sample.outcome or 'no verdict')}"
    return f"""<div class="answer {kind}"><header><b>{escape(name)}</b><span>{verdict}</span></header>
<pre class="said">{said}</pre></div>"""


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
