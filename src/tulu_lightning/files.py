"""Files and folders that are whole or not there, also after a kill or a power cut."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "content_digest",
    "of_the_disk",
    "put_in_place",
    "remove",
    "remove_whole",
    "sync",
    "write_rows",
    "write_whole",
]

FULL_BYTES = 8 << 30
"""Files of up to this size in all are read in full for a digest."""
STRIDE, PIECE = 64 << 20, 1 << 20
"""Of larger ones, the first `PIECE` bytes of every `STRIDE` in each file, and the last."""


def write_whole(path: Path, text: str) -> None:
    """Write beside the file, and rename once the disk has it: what stops us leaves the old file or the new one, whole."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    beside.replace(path)
    sync(path.parent)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines as `write_whole` does."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def put_in_place(beside: Path, path: Path) -> None:
    """Give a finished file or folder its name, once all that it holds is on the disk.

    What has the name already is replaced: a file in one step; a folder is removed first.
    """
    for file in (*beside.rglob("*"), beside) if beside.is_dir() else (beside,):
        sync(file)
    if path.is_dir() or (path.exists() and beside.is_dir()):
        remove_whole(path)
    os.replace(beside, path)
    sync(path.parent)


def system_code(error: BaseException) -> int:
    """The system's error number, 0 for none; libraries in Rust, such as safetensors, tell it in words."""
    if isinstance(error, OSError):
        return error.errno or 0
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else 0


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or which names a folder has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it; nothing if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_whole(path: Path) -> None:
    """Remove a file or folder that others take for whole while it has its name: a kill leaves a hidden rest."""
    beside = path.with_name(f".{path.name}.gone.tmp")
    remove(beside)  # of a kill before
    os.replace(path, beside)
    remove(beside)


def of_the_disk(error: BaseException, path: Path) -> OSError | None:
    """What the system said behind an error of `torch.save`, which tells a full disk in words of its own; else None."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return None if cause is None else OSError(cause.errno, cause.strerror, str(path))


def content_digest(files: Sequence[Path]) -> str:
    """Hash of files' names, sizes and content (spread pieces of it beyond 8 GiB in all).

    Returns:
        Hexadecimal; of no files, too.
    """
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
