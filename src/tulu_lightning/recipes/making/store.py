"""Rows on disk, one JSON object a line in numbered shards, that a killed command goes on from without losing or doubling one.

A folder belongs to one command with one set of settings (`settings.json`). A row has a `key` that says which piece of
work it is the outcome of; work whose key is there already is not done again. A command that is through may turn its
shards into Parquet; a shard's lines are removed when its Parquet file is on the disk, and until then they are the rows.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tulu_lightning.errors import InputError
from tulu_lightning.files import write_whole
from tulu_lightning.recipes.making.parquet import columns_of, rows_of_parquet, write_parquet

__all__ = ["RowStore", "read_rows", "read_settings", "text_digest"]

SHARD_ROWS = 10_000
LINES, PARQUET = ".jsonl", ".parquet"


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
        self._in_shard = self._shard = 0
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
            self._shard, self._in_shard = int(path.stem.removeprefix("rows-")), 0
            for row in _rows(path):
                self.done.add(row["key"])
                self._in_shard += 1
            if path.suffix == PARQUET:  # which takes no more rows
                self._in_shard = self._shard_rows

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

    def to_parquet(self) -> None:
        """Turn all shards into Parquet files with the same columns. Killed at any point, no row is lost or doubled.

        Raises:
            OSError: the disk is full; the lines stay.
        """
        shards = _shards(self.folder)
        if all(path.suffix == PARQUET for path in shards):
            return
        columns = columns_of(list(_rows(path)) for path in shards)
        for path in shards:
            write_parquet(path.with_suffix(PARQUET), list(_rows(path)), columns)
            if path.suffix != PARQUET:
                path.unlink()
        self._in_shard = self._shard_rows

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


def text_digest(text: str) -> str:
    """Short hash by which a row says what text it is about: keys name work, and work may be done again on other texts."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def read_rows(folder: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a folder that a `RowStore` wrote, or of one file: Parquet by its name, else JSON lines.

    Raises:
        InputError: nothing is there, or a line is damaged.
    """
    path = Path(folder)
    files = [path] if path.is_file() else _shards(path)
    if not files:
        remedy = "Give the folder that the command before this one wrote."
        raise InputError(str(folder), "there are no rows (rows-*.jsonl or rows-*.parquet)", remedy)
    for file in files:
        yield from _rows(file)


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
    return folder / f"rows-{number:05d}{LINES}"


def _shards(folder: Path) -> list[Path]:
    """A file for each number: a Parquet file that has its name is whole, and its lines may not be gone yet."""
    found = {path.stem: path for suffix in (LINES, PARQUET) for path in folder.glob(f"rows-*{suffix}")}
    return [found[stem] for stem in sorted(found)]


def _mend(folder: Path) -> None:
    """Remove what a kill left over, and cut off a half-written last line; a row is whole when its newline is there."""
    for path in folder.glob(f".rows-*{PARQUET}.tmp"):
        path.unlink()
    shards = _shards(folder)
    for path in shards:
        if path.suffix == PARQUET:
            path.with_suffix(LINES).unlink(missing_ok=True)
    for path in (path for path in shards[-1:] if path.suffix == LINES):
        raw = path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            os.truncate(path, whole)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == LINES and not path.exists():  # the command that writes them has just turned them into Parquet
        path = path.with_suffix(PARQUET)
    return rows_of_parquet(path) if path.suffix == PARQUET else _lines(path)


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
