"""A run folder, read into typed records: what the report and the score table are made of.

A run may have been killed at any moment, so reading forgives: a missing file is an absent record, a torn JSON line is
left out, and every such thing becomes a note for the reader. Only a folder that is no run at all is an error.

    RUN/recipe.json
    RUN/<stage>/config.yaml  metrics.jsonl  summary.json  scores/before.json  scores/after.json
    RUN/<stage>/rollouts.jsonl

A stage that was run by itself (`tulu fit`) is read as a run of that one stage.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tulu_lightning.errors import InputError

STAGE_FILES = ("config.yaml", "metrics.jsonl", "summary.json")


class Scores(NamedTuple):
    """Held-out accuracy at one moment, with its 95% interval (all three in [0, 1])."""

    accuracy: float
    low: float | None
    high: float | None
    n: int | None
    mean_tokens: float | None
    settings_hash: str
    """Prompts, sampling and verifier in one hash: two scores compare only where it is the same."""


class Decision(NamedTuple):
    """Whether the stage's checkpoint moved on, and the paired difference (after minus before) that decided it."""

    promote: bool
    reason: str
    difference: float | None
    low: float | None
    high: float | None


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

    @property
    def status(self) -> str:
        """`finished`, `unfinished` (it runs, or was stopped), or `not started`."""
        if self.summary is not None:
            return "finished"
        return "unfinished" if self.metrics or self.config is not None else "not started"

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
    recipe = _read_object(run_dir / "recipe.json", "recipe.json", notes) or {}
    if not (run_dir / "recipe.json").exists() and _is_stage(run_dir):
        folders = [run_dir]
    else:
        folders = _stage_folders(run_dir, recipe)
    _note_other_versions(recipe, notes)
    return RunRecord(
        path=run_dir,
        name=_text(recipe.get("name")) or run_dir.resolve().name,
        created=_text(recipe.get("created")),
        command=_text(recipe.get("command")),
        versions=_mapping(recipe.get("versions")),
        seeds=_mapping(recipe.get("seeds")),
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
    first = _mapping(recipe.get("versions"))
    starts = recipe.get("starts")
    for start in starts if isinstance(starts, list) else ():
        now = _mapping(_mapping(start).get("versions"))
        if other := [f"{name} {now[name]}" for name in now if now[name] != first.get(name, now[name])]:
            notes.append(f"Started again {_text(start.get('time'))} with other packages: {_text(', '.join(other))}.")


def number(value: Any) -> float | None:
    """The value as a finite float; None for anything else (a missing key, text, true, NaN)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON integers have no limit
        return None


def _read_stage(folder: Path, notes: list[str]) -> StageRecord:
    name = folder.resolve().name
    config = folder / "config.yaml"
    summary = _read_object(folder / "summary.json", f"{name}/summary.json", notes)
    before, after = (
        _read_scores(folder / "scores" / f"{when}.json", f"{name}/scores/{when}.json", notes)
        for when in ("before", "after")
    )
    if before and after and before.settings_hash != after.settings_hash:
        notes.append(f"{name}: the scores before and after were taken with different settings and do not compare.")
    return StageRecord(
        name=name,
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
        metrics=tuple(_read_metrics(folder / "metrics.jsonl", f"{name}/metrics.jsonl", notes)),
        before=before,
        after=after,
        summary=summary,
        decision=_decision(summary),
    )


def _read_object(path: Path, label: str, notes: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        notes.append(f"{label} is not a JSON object (cut off while being written?) and was left out.")
        return None
    return value


def _read_lines(path: Path, label: str, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a .jsonl file; a torn line is counted in a note and skipped."""
    if not path.is_file():
        return
    torn = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if isinstance(value, dict):
                yield value
            else:
                torn += 1
    if torn:
        notes.append(f"{label}: {torn} torn {'line was' if torn == 1 else 'lines were'} left out.")


def _read_metrics(path: Path, label: str, notes: list[str]) -> list[dict[str, float]]:
    rows: dict[float, dict[str, float]] = {}
    dropped: set[str] = set()
    for value in _read_lines(path, label, notes):
        row = {key: x for key, v in value.items() if (x := number(v)) is not None}
        dropped |= {key for key, v in value.items() if isinstance(v, float) and key not in row}
        if "step" in row:
            rows[row["step"]] = row  # the later line wins: a killed run takes its last steps again
    if dropped:
        notes.append(f"{label}: not finite in some steps, and not drawn there: {', '.join(sorted(dropped))}.")
    return [rows[step] for step in sorted(rows)]


def _read_scores(path: Path, label: str, notes: list[str]) -> Scores | None:
    value = _read_object(path, label, notes)
    summary = _mapping(value.get("summary")) if value else {}
    if value is None or (accuracy := number(summary.get("accuracy"))) is None:
        return None
    n = number(summary.get("n"))
    interval = summary.get("interval")
    low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
    return Scores(
        accuracy=accuracy,
        low=number(low),
        high=number(high),
        n=None if n is None else int(n),
        mean_tokens=number(summary.get("mean_tokens")),
        settings_hash=_text(value.get("settings")),
    )


def _decision(summary: Mapping[str, Any] | None) -> Decision | None:
    if summary is None:
        return None
    value = summary.get("decision")
    if not isinstance(value, dict):
        promoted = summary.get("promoted")
        return None if promoted is None else Decision(promoted is True, "", None, None, None)
    low, high, difference = (number(value.get(key)) for key in ("low", "high", "difference"))
    return Decision(value.get("promote") is True, _text(value.get("reason")), difference, low, high)


def _read_rollouts(folder: Path, notes: list[str]) -> Iterator[Rollout]:
    """The first two rollouts of every (step, outcome): enough to show, and a long run still fits into memory."""
    seen: dict[tuple[float, str], int] = {}
    name = folder.resolve().name
    for value in _read_lines(folder / "rollouts.jsonl", f"{name}/rollouts.jsonl", notes):
        step, outcome = number(value.get("step")), _text(value.get("outcome"))
        if step is None or seen.get((step, outcome), 0) >= 2:
            continue
        seen[step, outcome] = seen.get((step, outcome), 0) + 1
        tokens = number(value.get("tokens"))
        yield Rollout(
            step=int(step),
            prompt=_text(value.get("prompt")),
            response=_text(value.get("response")),
            outcome=outcome,
            score=number(value.get("score")),
            reward=number(value.get("reward")),
            advantage=number(value.get("advantage")),
            tokens=None if tokens is None else int(tokens),
            finish=_text(value.get("finish")),
            stage=name,
        )


def _text(value: Any) -> str:
    """The value as text that any file can hold: a lone surrogate is legal in JSON and not in UTF-8."""
    return "" if value is None else str(value).encode("utf-8", "replace").decode("utf-8")


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
