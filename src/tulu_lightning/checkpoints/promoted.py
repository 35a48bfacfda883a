"""Records of promotion decisions: one file a decision, read-only, sealed, never written over.

    RUN/promotions/step-000040.json     the decision after 40 steps
    RUN/exports/step-000040/            the weights that it is about, with a copy of the record if they were promoted
    RUN/promoted -> exports/step-000040

The order is: export, record, copy, link. A kill between two of them leaves a folder that nothing names, or a record whose
link has not moved yet; the same command then does what is missing.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import tulu_lightning
from tulu_lightning.checkpoints.card import COPY
from tulu_lightning.checkpoints.export import publish
from tulu_lightning.checkpoints.identity import weights_digest
from tulu_lightning.errors import InputError
from tulu_lightning.files import write_whole

__all__ = [
    "COPY",
    "code_version",
    "export_folder",
    "move",
    "read_record",
    "read_records",
    "record_path",
    "write_record",
]

SEAL = "sha256"


def record_path(run: Path, step: int) -> Path:
    """Where the decision after that many steps lies."""
    return run / "promotions" / f"step-{step:06d}.json"


def export_folder(run: Path, step: int) -> Path:
    """Where the weights after that many steps are exported to."""
    return run / "exports" / f"step-{step:06d}"


def write_record(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write a record, whole, read-only and with the hash of its own content; one that is there is not touched.

    Returns:
        The record that is on disk now.

    Raises:
        InputError: there is another one of that name.
    """
    sealed = {**record, SEAL: _seal(record)}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(sealed, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    beside.chmod(0o444)
    try:
        os.link(beside, path)  # unlike a rename it fails if the name is taken
    except FileExistsError as error:
        remedy = "Records are not written over: give another run folder (trainer.default_root_dir)."
        raise InputError(str(path), "there is a record of this decision already", remedy) from error
    except OSError:  # a file system without links
        with path.open("x", encoding="utf-8") as file:
            file.write(beside.read_text(encoding="utf-8"))
        path.chmod(0o444)
    finally:
        beside.unlink()
    return sealed


def _seal(record: Mapping[str, Any]) -> str:
    plain = {key: value for key, value in record.items() if key != SEAL}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """One record.

    Raises:
        InputError: it does not load, or was changed after it was written.
    """
    remedy = "Put the original back; without it nobody knows what was decided."
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        sealed = record[SEAL]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            str(path), f"it is no record of a promotion ({type(error).__name__}: {error})", remedy
        ) from error
    if sealed != _seal(record):
        raise InputError(str(path), "it was changed after it was written: its hash is another one", remedy)
    return record


def read_records(run: Path) -> list[dict[str, Any]]:
    """All decisions of a run, by step. Raises as `read_record`."""
    return [read_record(path) for path in sorted((run / "promotions").glob("step-*.json"), key=_order)]


def _order(path: Path) -> tuple[int, str]:
    return len(path.name), path.name


def move(run: Path, record: Mapping[str, Any]) -> None:
    """Do what a record says: put a copy beside the weights, and point `promoted` at them in one step.

    Raises:
        InputError: the weights are gone, or are others.
    """
    folder = run / record["export"]
    if not folder.is_dir() or weights_digest(folder) != record["weights"]:
        what = "it does not hold the weights that the record of their promotion is about"
        raise InputError(str(folder), what, "Put them back, or give another run folder (trainer.default_root_dir).")
    write_whole(folder / COPY, json.dumps(record, indent=1, ensure_ascii=False))
    publish(folder, run / "promoted")


@cache
def code_version() -> dict[str, str | None]:
    """Version of this package, hash of its source files, and the git revision they are at, if they are in a clone."""
    root = Path(tulu_lightning.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    revision = None
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        tracked = ["git", "-C", str(root), "ls-files", "--error-unmatch", "__init__.py"]
        subprocess.run(tracked, capture_output=True, timeout=10, check=True)  # an environment may lie in another clone
        revision = done.stdout.strip()
    return {"tulu_lightning": tulu_lightning.__version__, "source": digest.hexdigest()[:16], "git": revision}
