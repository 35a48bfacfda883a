"""What makes a run that run: a flat record of its start weights, its data and the numbers that decide its mathematics.

A checkpoint and its run folder carry the record, so that going on with anything else is refused by name. What only
sets speed (packing, ranks, saving, logging) is not in it.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from tulu_lightning import __version__
from tulu_lightning.errors import InputError, nearest
from tulu_lightning.files import content_digest, write_whole

__all__ = [
    "Value",
    "check_identity",
    "check_run",
    "config_digest",
    "flat",
    "read_identity",
    "versions",
    "weights_digest",
    "write_identity",
]

Value = str | int | float | bool | None
NAME = "identity.json"
NAMES_ONLY = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Entries of a model's config.json that change no log-prob."""


def weights_digest(folder: str | Path) -> str:
    """Hash of a model folder's safetensors: names, sizes and content (spread pieces of it beyond 8 GiB in all).

    Returns:
        Hexadecimal; of no files, too: whether there are weights is `resolve_model`'s to say.
    """
    return content_digest(sorted(Path(folder).glob("*.safetensors")))


def config_digest(folder: str | Path) -> str:
    """Hash of what a model folder's config.json says of its computation; hexadecimal."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in NAMES_ONLY}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def flat(name: str, value: Any) -> dict[str, Value]:
    """A setting as plain values under dotted names; a dataclass gives one for each field, and its class.

    Example: `flat("loss", DPO(beta=5.0))` is `{"loss": "DPO", "loss.beta": 5.0, "loss.length_normalised": True}`.
    """
    return dict(_flat(name, value))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Value]]:
    if dataclasses.is_dataclass(value):
        yield name, type(value).__name__
        for field in dataclasses.fields(value):
            yield from _flat(f"{name}.{field.name}", getattr(value, field.name))
    elif value is None or isinstance(value, str | int | float | bool):
        yield name, value
    elif isinstance(value, list | tuple):
        yield name, json.dumps(value)
    elif isinstance(value, Mapping):
        yield name, json.dumps(value, sort_keys=True, default=repr)
    else:  # a user's own class that is no dataclass has its settings in attributes
        yield name, type(value).__qualname__
        for attribute, item in sorted(getattr(value, "__dict__", {}).items()):
            if not attribute.startswith("_") and (item is None or isinstance(item, str | int | float | bool)):
                yield f"{name}.{attribute}", item


DATA = "data rows"
"""The entry that holds the digest of the rows."""
WITH_DATA = (DATA, "total steps")
"""What `data.accept_changed_data` accepts: the rows, and with them the number of steps that an epoch takes."""


def check_identity(
    where: str,
    before: Mapping[str, Value],
    now: Mapping[str, Value],
    accepted: Collection[str] = (),
    never: Collection[str] = (),
) -> dict[str, str]:
    """Refuse to go on with other settings than those that a run was started with.

    Names that only one side has are left out: they belong to another version of this package, or to a `flat` part whose
    class has changed, which is in both.

    Args:
        where: what is gone on with, for the message.
        before: the record of the start.
        now: the present one.
        accepted: names that may differ.
        never: names that the message does not offer to accept.

    Returns:
        What differs and was accepted: in words, by name.

    Raises:
        InputError: an accepted name is none of the settings', or another value differs; it names each, with both.
    """
    for name in accepted:
        if name not in before and name not in now:
            what = f"names {name!r}, and no such setting decides the course of this run"
            raise InputError("accept_changes", what, nearest(name, {*before, *now}))
    changed = [name for name in before if name in now and before[name] != now[name]]
    said = {name: f"{name} was {_said(before[name])} and is {_said(now[name])}" for name in changed}
    refused = [name for name in changed if name not in accepted]
    if refused:
        remedy = "Set it back to go on, give another run folder (trainer.default_root_dir), or remove this one."
        if may := [name for name in refused if name not in never]:
            remedy += f" To go on all the same, as another run than it was: --accept_changes='{','.join(may)}'."
        if DATA in may:
            remedy += " To go on with the changed rows, set data.init_args.accept_changed_data to true."
        what = f"the run was started with other settings: {'; '.join(said[name] for name in refused)}"
        raise InputError(where, what, remedy)
    return said


NEVER = ("stage",)
"""What nobody can accept: the weights of one stage's networks are no other's."""


def check_run(where: str, before: Mapping[str, Value], stage: Any, say: bool = False) -> None:
    """`check_identity` of a stage that is about to train; callbacks and the data module may accept changes.

    Args:
        where: what is gone on with, for the message.
        before: its record.
        stage: with a trainer.
        say: say which changes were accepted.

    Raises:
        InputError: what `check_identity` finds, or changed rows in a stage that keeps numbers about each of them.
    """
    trainer, now = stage.trainer, stage.identity()
    names = {name for callback in trainer.callbacks for name in getattr(callback, "accept_changes", ())} - {*NEVER}
    data = bool(getattr(trainer.datamodule, "accept_changed_data", False))
    if data and DATA in before and before[DATA] != now.get(DATA):
        names |= {*WITH_DATA} & {*before, *now}
    never = (*NEVER, *(WITH_DATA if stage.keeps_rows or data else ()))
    accepted = check_identity(where, before, now, sorted(names), never)
    if DATA in accepted and stage.keeps_rows:
        key, value = ("data.accept_changed_data", "true") if data else ("accept_changes", repr(DATA))
        kept = f"{type(stage).__name__} keeps numbers about each row that it started with"
        remedy = f"Start a new run on the changed rows.{stage.without_rows}"
        raise InputError(key, f"is {value}, and {kept} ({accepted[DATA]})", remedy)
    if accepted and say:
        rank_zero_info(f"{where}: going on with accepted changes: {'; '.join(accepted.values())}")


def versions() -> dict[str, str]:
    """Of this package, and of those that its numbers depend on."""
    packages = ("torch", "lightning", "transformers")
    return {"tulu_lightning": __version__, **{name: importlib.metadata.version(name) for name in packages}}


def _said(value: Value) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)


def read_identity(run: Path) -> dict[str, Value]:
    """The record of a run folder; empty if it has none."""
    try:
        record = json.loads((run / NAME).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return record if isinstance(record, dict) else {}


def write_identity(run: Path, identity: Mapping[str, Value]) -> None:
    """Write the record into a run folder, whole or not at all."""
    run.mkdir(parents=True, exist_ok=True)
    write_whole(run / NAME, json.dumps(identity, indent=1))
