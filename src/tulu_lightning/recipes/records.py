"""A run folder, read into typed records: what the report and the score table are made of.

A run may have been killed at any moment, so reading forgives: a missing file is an absent record, a torn JSON line is
left out, and every such thing becomes a note for the reader. Only a folder that is no run at all is an error.

    RUN/recipe.json
    RUN/<stage>/config.yaml  config_origin.json  data_manifest.json  metrics.jsonl  validation.jsonl  rollouts.jsonl
    RUN/<stage>/pairs.jsonl  scores/ (see `score_records`)  promotions/ (see `decision_records`)  summary.json

A stage that was run by itself (`tulu fit`) is read as a run of that one stage.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tulu_lightning.core.promotion import HELD_OUT
from tulu_lightning.errors import InputError
from tulu_lightning.recipes.decision_records import Decision, decision_in_summary, read_decisions, standing
from tulu_lightning.recipes.pair_lengths import PairLengths, pair_lengths
from tulu_lightning.recipes.reading import callback_settings, mapping, number, read_lines, read_object, text
from tulu_lightning.recipes.score_records import Scores, read_stage_scores

__all__ = ["Decision", "Rollout", "RunRecord", "Scores", "StageRecord", "read_run"]

STAGE_FILES = ("config.yaml", "metrics.jsonl", "summary.json")


class Rollout(NamedTuple):
    """One response that a stage sampled while it trained, as it was scored."""

    step: int
    prompt: str
    response: str
    outcome: str
    score: float | None
    reward: float | None
    advantage: float | None
    tokens: int | None
    finish: str
    stage: str = ""


class StageRecord(NamedTuple):
    """All that is on disk of one stage."""

    name: str
    config: str | None
    """Text of its resolved config."""
    metrics: tuple[Mapping[str, float], ...]
    """One mapping a step, in step order, finite numbers only; a step that ran twice (after a resume) counts once."""
    before: Scores | None
    after: Scores | None
    summary: Mapping[str, Any] | None
    """The stage's closing record; None while it has not finished."""
    decision: Decision | None
    """The one that counts: the last that promoted, else the last."""
    pair_lengths: PairLengths | None = None
    """Of the pairs that the stage made; None for a stage that makes none."""
    validation: tuple[Mapping[str, float], ...] = ()
    """One mapping a validation (`step`, `val_loss` and so on), in step order."""
    between: tuple[tuple[int, Scores], ...] = ()
    """Held-out scores in between: (finished steps, scores), in step order."""
    tasks: Mapping[str, Mapping[str, Scores]] = {}
    """Scores of further tasks: by moment (`before`, `step_<n>`, `after`), then by task."""
    manifest: Mapping[str, Any] | None = None
    """What it was trained on: `data_manifest.json`."""
    origin: Mapping[str, Any] | None = None
    """What its config files say and what was set over them: `config_origin.json`."""
    decisions: tuple[Decision, ...] = ()
    """All sealed ones, by step; empty where only the closing record tells of a decision."""

    @property
    def status(self) -> str:
        """`finished`, `unfinished` (it runs, or was stopped), or `not started`."""
        if self.summary is not None:
            return "finished"
        return "unfinished" if self.metrics or self.config is not None else "not started"

    @property
    def decided_by(self) -> str:
        """The task that its scores before and after are shown of: the one that decides, `held-out` for the prompts.

        Before anything is decided, the held-out prompts, the only task, or the first that the promotion's rule names;
        empty where none of them tells.
        """
        if self.decision is not None and self.decision.task:
            return self.decision.task
        tasks = list(dict.fromkeys(task for scores in self.tasks.values() for task in scores))
        if self.before or self.after or len(tasks) == 1:
            return HELD_OUT if self.before or self.after else tasks[0]
        rule = mapping(callback_settings(self.config, "Promote").get("rule"))
        named = [*mapping(rule.get("gains")), *mapping(rule.get("guards"))]
        return next((task for task in named if task in tasks), "")

    @property
    def ends(self) -> tuple[Scores | None, Scores | None]:
        """Scores before the first step and after the last one, on the task that decides."""
        if self.decided_by == HELD_OUT:
            return self.before, self.after
        before, after = (self.tasks.get(moment, {}).get(self.decided_by) for moment in ("before", "after"))
        return before, after

    def total(self, key: str) -> float | None:
        """Seconds, tokens or the like of the whole stage: from its summary, or summed over the steps so far."""
        if self.summary is not None:
            return number(self.summary.get(key))
        values = [row[key] for row in self.metrics if key in row]
        return sum(values) if values else None


class RunRecord(NamedTuple):
    """One run folder."""

    path: Path
    name: str
    created: str
    command: str
    versions: Mapping[str, Any]
    seeds: Mapping[str, Any]
    stages: tuple[StageRecord, ...]
    rollouts: tuple[Rollout, ...]
    notes: tuple[str, ...]
    """What could not be read, or should be known before believing the numbers; one sentence each."""


def read_run(run_dir: Path) -> RunRecord:
    """Reads a run folder, whatever state it is in.

    Raises:
        InputError: the folder does not exist, or is no stage and holds neither a recipe.json nor a stage.
    """
    if not run_dir.is_dir():
        raise InputError(str(run_dir), "no such folder", "Give the folder of a run, e.g. runs/smol.")
    notes: list[str] = []
    recipe = read_object(run_dir / "recipe.json", "recipe.json", notes) or {}
    if not (run_dir / "recipe.json").exists() and _is_stage(run_dir):
        folders = [run_dir]
    else:
        folders = _stage_folders(run_dir, recipe)
    _note_other_versions(recipe, notes)
    return RunRecord(
        path=run_dir,
        name=text(recipe.get("name")) or run_dir.resolve().name,
        created=text(recipe.get("created")),
        command=text(recipe.get("command")),
        versions=mapping(recipe.get("versions")),
        seeds=mapping(recipe.get("seeds")),
        stages=tuple(_read_stage(folder, notes) for folder in folders),
        rollouts=tuple(rollout for folder in folders for rollout in _read_rollouts(folder, notes)),
        notes=tuple(notes),
    )


def _is_stage(folder: Path) -> bool:
    return any((folder / name).is_file() for name in STAGE_FILES)


def _stage_folders(run_dir: Path, recipe: Mapping[str, Any]) -> list[Path]:
    """Those that the recipe plans, in its order, then any others."""
    found = [p for p in sorted(run_dir.iterdir()) if _is_stage(p)]
    if not found and not (run_dir / "recipe.json").exists():
        remedy = "Give the folder that `tulu recipe` or `tulu fit` wrote."
        raise InputError(str(run_dir), "holds neither recipe.json nor a stage", remedy)
    planned = recipe.get("stages")
    # A stage's name becomes a path, so one that is not a plain folder name is not followed out of the run.
    names = [s for s in planned if isinstance(s, str) and Path(s).name == s] if isinstance(planned, list) else []
    # Without the recipe, the order in which the stages took place is that of their configs.
    found.sort(key=lambda p: (p / "config.yaml").stat().st_mtime if (p / "config.yaml").exists() else math.inf)
    names += [p.name for p in found if p.name not in names]
    return [run_dir / name for name in names]


def _note_other_versions(recipe: Mapping[str, Any], notes: list[str]) -> None:
    """Say where a run went on with other packages than those it began with."""
    first = mapping(recipe.get("versions"))
    starts = recipe.get("starts")
    for start in starts if isinstance(starts, list) else ():
        now = mapping(mapping(start).get("versions"))
        if other := [f"{name} {now[name]}" for name in now if now[name] != first.get(name, now[name])]:
            notes.append(f"Started again {text(start.get('time'))} with other packages: {text(', '.join(other))}.")


def _read_stage(folder: Path, notes: list[str]) -> StageRecord:
    name = folder.resolve().name
    config = folder / "config.yaml"
    summary = read_object(folder / "summary.json", f"{name}/summary.json", notes)
    before, after, between, tasks = read_stage_scores(folder, name, notes)
    decisions = read_decisions(folder, name, notes)
    stage = StageRecord(
        name=name,
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
        metrics=tuple(_read_metrics(folder / "metrics.jsonl", f"{name}/metrics.jsonl", notes)),
        validation=tuple(_read_metrics(folder / "validation.jsonl", f"{name}/validation.jsonl", notes)),
        between=between,
        tasks=tasks,
        manifest=read_object(folder / "data_manifest.json", f"{name}/data_manifest.json", notes),
        origin=read_object(folder / "config_origin.json", f"{name}/config_origin.json", notes),
        before=before,
        after=after,
        summary=summary,
        decision=standing(decisions) or decision_in_summary(summary),
        decisions=decisions,
        pair_lengths=_pair_lengths(folder, summary or {}, notes),
    )
    first, last = stage.ends
    if first and last and first.settings_hash != last.settings_hash:
        notes.append(f"{name}: the scores before and after were taken with different settings and do not compare.")
    return stage


def _read_metrics(path: Path, label: str, notes: list[str]) -> list[dict[str, float]]:
    rows: dict[float, dict[str, float]] = {}
    dropped: set[str] = set()
    for value in read_lines(path, label, notes):
        row = {key: x for key, v in value.items() if (x := number(v)) is not None}
        dropped |= {key for key, v in value.items() if isinstance(v, float) and key not in row}
        if "step" in row:
            rows[row["step"]] = row  # the later line wins: a killed run takes its last steps again
    if dropped:
        notes.append(f"{label}: not finite in some steps, and not drawn there: {', '.join(sorted(dropped))}.")
    return [rows[step] for step in sorted(rows)]


def _pair_lengths(folder: Path, summary: Mapping[str, Any], notes: list[str]) -> PairLengths | None:
    """From the summary; one of an older version has none, and the pairs themselves are asked."""
    if number(summary.get("pairs")) is None:
        return None
    known = [number(mapping(summary.get("lengths")).get(name)) for name in PairLengths._fields]
    if (values := [value for value in known if value is not None]) and len(values) == len(known):
        return PairLengths(int(values[0]), *values[1:])
    rows = read_lines(folder / "pairs.jsonl", f"{folder.resolve().name}/pairs.jsonl", notes)
    sides = [(row.get("chosen_ids"), row.get("rejected_ids")) for row in rows]
    return pair_lengths((len(a), len(b)) for a, b in sides if isinstance(a, list) and isinstance(b, list))


def _read_rollouts(folder: Path, notes: list[str]) -> Iterator[Rollout]:
    """The first two rollouts of every (step, outcome): enough to show, and a long run still fits into memory."""
    seen: dict[tuple[float, str], int] = {}
    name = folder.resolve().name
    for value in read_lines(folder / "rollouts.jsonl", f"{name}/rollouts.jsonl", notes):
        step, outcome = number(value.get("step")), text(value.get("outcome"))
        if step is None or seen.get((step, outcome), 0) >= 2:
            continue
        seen[step, outcome] = seen.get((step, outcome), 0) + 1
        tokens = number(value.get("tokens"))
        yield Rollout(
            step=int(step),
            prompt=text(value.get("prompt")),
            response=text(value.get("response")),
            outcome=outcome,
            score=number(value.get("score")),
            reward=number(value.get("reward")),
            advantage=number(value.get("advantage")),
            tokens=None if tokens is None else int(tokens),
            finish=text(value.get("finish")),
            stage=name,
        )
