"""From a checkpoint back to the base model, by the records of what each stage started from and made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tulu_lightning.checkpoints.card import COPY, LINEAGE, chain_behind
from tulu_lightning.checkpoints.identity import weights_digest
from tulu_lightning.checkpoints.promoted import read_record, read_records
from tulu_lightning.errors import InputError

__all__ = ["Chain", "Link", "chain"]


class Link(NamedTuple):
    """One checkpoint of a chain."""

    folder: Path
    """The Hugging Face folder."""
    weights: str
    """Hash of its weights."""
    record: Mapping[str, Any] | None
    """Of the decision on it; None for the base model."""
    name: str
    """The run's folder, or what the base model was called."""


class Chain(NamedTuple):
    """Checkpoints from the base model, or from where the chain breaks, to the one that was asked about."""

    links: tuple[Link, ...]
    broken: str
    """What is missing, in a sentence; empty for a whole chain."""


def chain(folder: Path) -> Chain:
    """Follow the records.

    Args:
        folder: an exported or promoted folder, a stage's run folder, or a recipe's.

    Raises:
        InputError: it is none of these, nothing in it was promoted, or a record was changed.
    """
    here = _checkpoint_of(folder)
    links: list[Link] = []
    name = str(folder)
    while True:
        record, broken = _record_of(here)
        digest = weights_digest(here)
        run = Path(record["run"]).name if record is not None else name
        links.insert(0, Link(here, digest, record, run))
        if record is None or broken:
            return Chain(tuple(links), broken)
        if record["weights"] != digest:
            return Chain(tuple(links), f"{here} holds other weights than its record says ({_short(record['weights'])})")
        parent, broken = _parent_of(here, record)
        if parent is None:
            return Chain(tuple(links), broken)
        if any(link.weights == record["parent"]["weights"] for link in links):
            return Chain(
                tuple(links), f"the record of {here} goes round in a circle: it names a later link as its start"
            )
        here, name = parent, record["parent"]["path"]


def _checkpoint_of(folder: Path) -> Path:
    """The checkpoint that a folder of whatever kind stands for."""
    if not folder.is_dir():
        raise InputError(str(folder), "there is no such folder", "Give a checkpoint's folder, or that of a run.")
    if (folder / "config.json").exists():
        return folder.resolve()
    runs = _stages(folder) if not (folder / "promotions").is_dir() else [folder]
    for run in reversed(runs):
        if (run / "promoted").is_dir():
            return (run / "promoted").resolve()
    if not runs:
        remedy = "Give a checkpoint's folder, or that of a run of `tulu fit` or `tulu recipe`."
        raise InputError(str(folder), "it is neither a checkpoint nor a run that decided on one", remedy)
    reasons = [f"{run.name}: {records[-1]['decision']['reason']}" for run in runs if (records := read_records(run))]
    what = f"nothing in it was promoted ({'; '.join(reasons)})"
    raise InputError(str(folder), what, f"Give a checkpoint's folder, e.g. one below {runs[-1] / 'exports'}.")


def _stages(run: Path) -> list[Path]:
    """Folders of a recipe's stages that decided something, in its order; of runs without a recipe, by name."""
    found = {path.parent.name: path.parent for path in sorted(run.glob("*/promotions"))}
    try:
        planned = json.loads((run / "recipe.json").read_text(encoding="utf-8"))["stages"]
    except (OSError, ValueError, KeyError):
        planned = sorted(found)
    return [found[name] for name in planned if name in found]  # a copy of a stage beside it is none of the recipe's


def _record_of(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The record of a checkpoint, None for a model that no run here made; and what is wrong with that."""
    if (folder / COPY).exists():
        return read_record(folder / COPY), ""
    if folder.parent.name != "exports" or not (folder.parents[1] / "metrics.jsonl").exists():
        return None, _told_by_card(folder)
    path = folder.parents[1] / "promotions" / f"{folder.name}.json"
    if path.exists():
        return read_record(path), ""
    return None, f"there is no record of how {folder} was made: {path} is missing"


def _told_by_card(folder: Path) -> str:
    """Of what `tulu export` wrote: that nobody decided on it, and what it says of itself; empty of a base model."""
    entries = chain_behind(folder)
    if not entries:
        return ""
    said = " → ".join([str(entries[0].get("start")), *(f"{e.get('stage')} ({e.get('step')} steps)" for e in entries)])
    return f"there is no record of how {folder} was made: it is an export without a {COPY}; its {LINEAGE} says {said}"


def _parent_of(folder: Path, record: Mapping[str, Any]) -> tuple[Path | None, str]:
    """Where the start weights are now, or what is missing."""
    wanted = record["parent"]
    run = folder.parents[1] if folder.parent.name == "exports" else Path(record["run"])
    places = dict.fromkeys([run / wanted["relative"], Path(wanted["folder"]), Path(wanted["path"])])
    other = []
    for place in places:
        if place.is_dir():
            if weights_digest(place) == wanted["weights"]:
                return place.resolve(), ""
            other.append(str(place))
    start = f"{wanted['path']} (weights {_short(wanted['weights'])}), which {folder} was trained from"
    if other:
        return None, f"{start}, is missing: {other[0]} holds other weights now"
    return None, f"{start}, is missing: there is no {wanted['folder']}"


def _short(digest: str | None) -> str:
    return str(digest)[:12]
