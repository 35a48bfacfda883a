"""The model card of an exported folder, and the chain of stages behind it, which travels with the folder.

`lineage.json` holds one entry a stage, the first stage first: each export copies its start's chain and adds its own entry.
So a folder knows where it comes from also after it has been moved, or its run removed.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tulu_lightning import __version__

__all__ = ["COPY", "LINEAGE", "chain_behind", "entry", "model_card", "told"]

COPY = "promotion.json"
"""Name of a promotion's record beside the weights."""
LINEAGE = "lineage.json"
ELSEWHERE = ("start weights", "start config", "data rows")
"""Digests, which are no settings."""
SETTINGS = 40
"""Rows of settings that the card shows of each stage; `lineage.json` has them all."""


def entry(
    stage: str,
    step: int,
    start: str,
    identity: Mapping[str, Any],
    manifest: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a chain says of one stage.

    Args:
        stage: its class, e.g. DPO.
        step: finished steps.
        start: the model that it started from.
        identity: `checkpoints.identity`'s record: start digest, data digest, every setting that decides the mathematics.
        manifest: of its data: sources, rows, digests.
        scores: what was measured, by name: values, or texts with an interval.
    """
    return {
        "stage": stage,
        "step": step,
        "start": start,
        "start_digest": identity.get("start weights"),
        "data_digest": identity.get("data rows"),
        "settings": {name: value for name, value in identity.items() if name not in ELSEWHERE},
        "data": _sources(manifest or {}),
        "scores": dict(scores or {}),
        "code": f"tulu_lightning {__version__}",
    }


def _sources(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = manifest.get("sources", [])
    pairs = rows.items() if isinstance(rows, Mapping) else ((row.get("name"), row) for row in rows)
    return [{"name": name, **{k: v for k, v in row.items() if isinstance(v, str | int | float)}} for name, row in pairs]


def told(score: Mapping[str, Any]) -> str:
    """A score with its interval, for `entry`.

    Args:
        score: with `score`, `low` and `high` as shares, and `n`.
    """
    low, high = 100 * score["low"], 100 * score["high"]
    return f"{100 * score['score']:.1f} [{low:.1f}, {high:.1f}], n = {score['n']}"


def chain_behind(start: str | Path) -> list[dict[str, Any]]:
    """The entries that a model folder brings along; empty for one that is not ours."""
    try:
        found = json.loads((Path(start) / LINEAGE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def model_card(chain: Sequence[Mapping[str, Any]], base: str, note: str = "") -> str:
    """README.md of a folder.

    Args:
        chain: entries, the last one of this model.
        base: the model before the first of them.
        note: a sentence about this folder, such as the dtype it was written in.
    """
    last = chain[-1]
    hub = base if base.count("/") == 1 and not base.startswith((".", "/")) else None
    head = ["---", "library_name: transformers", *([f"base_model: {hub}"] if hub else []), "---", ""]
    names = " → ".join([f"`{base}`", *(f"{each['stage']} ({each['step']:,} steps)" for each in chain)])
    lines = [*head, f"# {last['stage']}, step {last['step']:,}", "", f"Lineage: {names}", ""]
    if note:
        lines += [note, ""]
    for each in chain:
        lines += _stage(each)
    return "\n".join(lines).rstrip() + "\n"


def _stage(each: Mapping[str, Any]) -> list[str]:
    lines = [
        f"## {each['stage']}",
        "",
        f"From `{each['start']}` (weights {_short(each['start_digest'])}), {each['code']}.",
        "",
    ]
    if each["scores"]:
        lines += ["| Score | |", "|---|--:|", *(f"| {name} | {value} |" for name, value in each["scores"].items()), ""]
    lines += ["| Setting | Value |", "|---|---|"]
    told = [(name, value) for name, value in each["settings"].items() if value is not None]
    lines += [f"| `{name}` | {value} |" for name, value in told[:SETTINGS]]
    if len(told) > SETTINGS:
        lines += [f"| {len(told) - SETTINGS} more | in `{LINEAGE}` |"]
    lines += ["", f"Data (rows {_short(each['data_digest'])}):", ""]
    return [*lines, *([_source(source) for source in each["data"]] or ["- not recorded"]), ""]


def _source(source: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{source[name]:,} {name}" for name in ("used", "tokens") if isinstance(source.get(name), int))
    return f"- {source['name']}: {counts}, content {_short(source.get('digest'))}"


def _short(digest: object) -> str:
    return f"`{digest[:12]}`" if isinstance(digest, str) and digest else "not recorded"
