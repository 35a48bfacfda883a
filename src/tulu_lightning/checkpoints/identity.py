"""What makes a run that run: a flat record of its start weights, its data and the numbers that decide its mathematics.

A checkpoint and its run folder carry the record, so that going on with anything else is refused by name. What only
sets speed (packing, ranks, saving, logging) is not in it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from tulu_lightning.errors import InputError
from tulu_lightning.files import write_whole

__all__ = ["Value", "check_identity", "check_run", "flat", "read_identity", "weights_digest", "write_identity"]

Value = str | int | float | bool | None
NAME = "identity.json"
FULL_BYTES = 8 << 30
"""Weights up to this size are read in full."""
STRIDE, PIECE = 64 << 20, 1 << 20
"""Of larger ones, the first `PIECE` bytes of every `STRIDE` in each file: training changes nearly every value."""


def weights_digest(folder: str | Path) -> str:
    """Hash of a model folder's safetensors: names, sizes and content (spread pieces of it beyond 8 GiB in all).

    Returns:
        Hexadecimal; of no files, too: whether there are weights is `resolve_model`'s to say.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    sizes = [path.stat().st_size for path in files]
    digest = hashlib.sha256()
    for path, size in zip(files, sizes, strict=True):
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if sum(sizes) <= FULL_BYTES:
                digest.update(hashlib.file_digest(file, "sha256").digest())
                continue
            for at in (*range(0, size, STRIDE), max(0, size - PIECE)):
                file.seek(at)
                digest.update(file.read(PIECE))
    return digest.hexdigest()


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
    else:
        yield name, type(value).__qualname__


DATA = "data rows"
"""The entry that holds the digest of the rows."""


def check_identity(
    where: str,
    before: Mapping[str, Value],
    now: Mapping[str, Value],
    accept_changed_data: bool = False,
    may_accept: bool = True,
) -> str:
    """Refuse to go on with other settings than those that a run was started with.

    Names that only one side has are left out: they belong to another version of this package, or to a `flat` part whose
    class has changed, which is in both.

    Args:
        where: what is gone on with, for the message.
        before: the record of the start.
        now: the present one.
        accept_changed_data: go on although the rows are others, and with them the number of steps that an epoch takes.
        may_accept: whether the message may offer that.

    Returns:
        What was accepted, in words; empty if nothing changed.

    Raises:
        InputError: a value differs; it names each, with both values.
    """
    changed = [name for name in before if name in now and before[name] != now[name]]
    accepted = (DATA, "total steps") if accept_changed_data and DATA in changed else ()
    said = {name: f"{name} was {_said(before[name])} and is {_said(now[name])}" for name in changed}
    refused = [said[name] for name in changed if name not in accepted]
    if refused:
        remedy = "Set it back to go on, give another run folder (trainer.default_root_dir), or remove this one."
        if DATA in changed and not accept_changed_data and may_accept:
            remedy += " To go on with the changed rows, set data.init_args.accept_changed_data to true."
        raise InputError(where, f"the run was started with other settings: {'; '.join(refused)}", remedy)
    return "; ".join(said.values())


def check_run(where: str, before: Mapping[str, Value], stage: Any) -> None:
    """`check_identity` of a stage that is about to train; its data module may accept changed rows, which is said.

    Raises:
        InputError: what `check_identity` finds, or changed rows in a stage that keeps numbers about each of them.
    """
    accept = bool(getattr(stage.trainer.datamodule, "accept_changed_data", False))
    accepted = check_identity(where, before, stage.identity(), accept, may_accept=not stage.keeps_rows)
    if accepted and stage.keeps_rows:
        what = f"is true, and {type(stage).__name__} keeps numbers about each row that it started with ({accepted})"
        raise InputError("data.accept_changed_data", what, f"Start a new run on the changed rows.{stage.without_rows}")
    if accepted:
        rank_zero_info(f"{where}: going on with changed data, as accept_changed_data says: {accepted}")


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
