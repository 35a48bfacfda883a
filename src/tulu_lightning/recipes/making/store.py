"""Rows on disk, one JSON object a line in numbered shards, that a killed command goes on from without losing or doubling one.

A folder belongs to one command with one set of settings (`settings.json`). A row has a `key` that says which piece of
work it is the outcome of; work whose key is there already is not done again.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tulu_lightning.errors import InputError
from tulu_lightning.files import write_whole

__all__ = ["RowStore", "read_rows", "read_settings"]

SHARD_ROWS = 10_000


class RowStore:
    """Appends rows to a folder; one process at a time.

    Args:
        folder: is made if it is not there.
        command: that writes it, e.g. `generate`.
        settings: what decides its rows, as plain data.
        shard_rows: rows of a file.

    Raises:
        InputError: the folder holds rows of another command or other settings, another process writes it now, or a
            line in its middle is damaged.
    """

    def __init__(
        self, folder: str | Path, command: str, settings: Mapping[str, Any], shard_rows: int = SHARD_ROWS
    ) -> None:
        self.folder, self._shard_rows = Path(folder), shard_rows
        self.folder.mkdir(parents=True, exist_ok=True)
        self.done: set[str] = set()
        """Keys of the rows that are there."""
        self._in_shard = 0
        self._lock = self._locked()
        try:
            self._open({"command": command, **json.loads(json.dumps(settings, default=str))})
        except BaseException:
            self.close()
            raise

    def _open(self, settings: dict[str, Any]) -> None:
        """See what is there already."""
        _claim(self.folder, settings)
        _mend(self.folder)
        for path in _shards(self.folder):
            self._in_shard = 0
            for row in _lines(path):
                self.done.add(row["key"])
                self._in_shard += 1
        self._shard = max(0, len(_shards(self.folder)) - 1)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows whose keys are new. They survive a SIGKILL from here on.

        Raises:
            ValueError: a key is there already, or JSON has no name for a number (NaN).
        """
        for row in rows:
            if row["key"] in self.done:
                raise ValueError(f"row {row['key']!r} is there already")
            if self._in_shard >= self._shard_rows:
                self._shard, self._in_shard = self._shard + 1, 0
            line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
            # One write of whole lines: what a kill can leave is a torn last line, which the next start cuts off.
            with _path(self.folder, self._shard).open("ab") as file:
                file.write(line.encode("utf-8", "surrogatepass"))
            self.done.add(row["key"])
            self._in_shard += 1

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows, in the order in which they were written."""
        return read_rows(self.folder)

    def close(self) -> None:
        """Let others write."""
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _locked(self) -> int:
        lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            remedy = "Wait for it, or give another output."
            raise InputError(str(self.folder), "another process is writing it", remedy) from None
        return lock


def read_rows(folder: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a folder that a `RowStore` wrote, or of one file of JSON lines.

    Raises:
        InputError: nothing is there, or a line is damaged.
    """
    path = Path(folder)
    files = [path] if path.is_file() else _shards(path)
    if not files:
        remedy = "Give the folder that the command before this one wrote."
        raise InputError(str(folder), "there are no rows (rows-*.jsonl)", remedy)
    for file in files:
        yield from _lines(file)


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The settings of a folder's rows; empty where there are none."""
    path = Path(folder, "settings.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "settings.json"
    if not path.exists():
        if stray := _shards(folder):
            raise InputError(str(stray[0]), "is here without a settings.json", "Give another output, or remove it.")
        write_whole(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if changed:
        name = changed[0]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        what = f"holds rows made with {name} = {_short(before.get(name))}, not {_short(settings.get(name))}{more}"
        raise InputError(str(folder), what, "Give another output, or remove it.")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _path(folder: Path, number: int) -> Path:
    return folder / f"rows-{number:05d}.jsonl"


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("rows-*.jsonl"))


def _mend(folder: Path) -> None:
    """Cut off a half-written last line; a row is whole when its newline is there."""
    for path in _shards(folder)[-1:]:
        raw = path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            os.truncate(path, whole)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") and path.name.startswith("rows-"):
                return  # being written, or torn by a kill
            try:
                row = json.loads(line.decode("utf-8", "surrogatepass"))
                row["key"]
            except (ValueError, LookupError, TypeError) as error:
                what = f"it is no row with a key ({type(error).__name__})"
                raise InputError(f"{path}, line {number}", what, "Remove the line; it will be made again.") from None
            yield row
