"""Reference log-probs on disk: one entry for each source and start model, filled chunk by chunk.

    <root>/<hash of the source's kept rows>/<hash of what else decides the numbers>/record.json
                                                                                    logps.bin

`logps.bin` is float32, one line [chosen, rejected] for each kept row of the source, in its order; NaN is a row that is
not computed yet. So a killed run costs the chunk that it was at, and the next one goes on. `record.json` states in plain
words what the numbers are of; when all are there it gets their hash, and the entry is never written again.

An entry knows nothing of mixtures, epochs or packs: up-sampled rows have one line, and every run on the same rows from
the same weights reads it.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tulu_lightning.assets.cache import cache_dir, locked, writing
from tulu_lightning.checkpoints.identity import Value
from tulu_lightning.errors import InputError
from tulu_lightning.files import write_whole

__all__ = ["Entry", "reference_dir", "refuse_others"]

FORMAT = 1
"""Of the files, and of how the numbers are computed; part of an entry's name."""
RECORD, LOGPS = "record.json", "logps.bin"
Array = np.ndarray[Any, np.dtype[np.float32]]


def reference_dir(folder: str | None = None) -> Path:
    """The folder given, else `$TULU_REFERENCE`, else `reference` in the cache; not created here."""
    given = folder or os.environ.get("TULU_REFERENCE")
    return Path(given).expanduser() if given else cache_dir() / "reference"


class Entry:
    """The numbers of one source under one start model.

    Args:
        root: from `reference_dir`.
        rows_digest: hash of the source's kept rows (`SourceRows.digest`).
        rows: how many they are.
        settings: what else decides the numbers, by name.
        label: name of the source, for messages.
    """

    def __init__(self, root: Path, rows_digest: str, rows: int, settings: Mapping[str, Value], label: str) -> None:
        self.root, self.rows, self.settings, self.label = root, rows, dict(settings), label
        text = json.dumps({"format": FORMAT, **self.settings}, sort_keys=True)
        self.folder = root / rows_digest[:32] / hashlib.sha256(text.encode()).hexdigest()[:16]

    def read(self) -> Array | None:
        """The finished numbers [rows, 2], mapped; None if they are not there, or unfinished, or damaged (reported)."""
        if not self.folder.is_dir():
            return None
        wrong, record = self._examine()
        if wrong:
            _say(f"{self._what} are damaged ({self.folder}: {wrong}); computing them again")
        return self._mapped("r").view(np.ndarray) if not wrong and "digest" in record else None

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Hold the entry against other processes; False if one of them holds it now. Never waits."""
        with ExitStack() as held:
            free = True
            try:
                with self._writing():
                    self.folder.parent.mkdir(parents=True, exist_ok=True)
                    held.enter_context(locked(self.folder.with_name(f".{self.folder.name}.lock"), _busy))
            except _Busy:
                free = False
            yield free

    def open(self) -> Array:
        """The numbers to go on with [rows, 2], in memory; the entry is made if there is none. Held alone.

        Raises:
            InputError: the folder cannot be written.
        """
        if self.folder.is_dir() and not self._examine()[0]:
            return np.array(self._mapped("r"))
        with self._writing():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            values = np.full((self.rows, 2), np.nan, dtype="<f4")
            values.tofile(self.folder / LOGPS)  # all of it: a full disk refuses here, not in the middle
            self._record({})
        return values

    def write(self, rows: Any, values: Array) -> None:
        """Keep the numbers of some rows, durably. Held alone.

        Args:
            rows: int64, which ones.
            values: float32 [len(rows), 2].
        """
        with self._writing():
            mapped = self._mapped("r+")
            mapped[rows] = values
            mapped.flush()

    def finish(self) -> None:
        """Say that all numbers are there."""
        with self._writing():
            self._record({"digest": self._digest()})

    # Files --------------------------------------------------------------------------------------------------------

    def _examine(self) -> tuple[str, dict[str, Any]]:
        """What is wrong with the entry (nothing: the empty text), and its record."""
        try:
            record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
            known = record["rows"], record["settings"]
            size = (self.folder / LOGPS).stat().st_size
        except (OSError, ValueError, TypeError, KeyError) as error:
            return f"a file cannot be read ({type(error).__name__})", {}
        if known != (self.rows, self.settings):
            return f"{RECORD} is of something else", {}
        if size != self.rows * 8:
            return f"{LOGPS} has {size} bytes instead of {self.rows * 8}", {}
        if "digest" in record and record["digest"] != self._digest():
            return f"{LOGPS} is not what was written", {}
        return "", record

    def _digest(self) -> str:
        with (self.folder / LOGPS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _record(self, more: dict[str, Any]) -> None:
        known = {"source": self.label, "rows": self.rows, "settings": self.settings, **more}
        write_whole(self.folder / RECORD, json.dumps(known, indent=1))

    def _mapped(self, mode: Any) -> np.memmap[Any, np.dtype[np.float32]]:
        return np.memmap(self.folder / LOGPS, dtype="<f4", mode=mode, shape=(self.rows, 2))

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self.root, "reference.folder, TULU_REFERENCE or TULU_CACHE")

    @property
    def _what(self) -> str:
        return f"source {self.label!r}: its reference log-probs"


def refuse_others(entry: Entry, start: str) -> None:
    """Refuse a folder that the user chose and that holds numbers of these rows, but of other weights or arithmetic.

    Args:
        entry: what the run wants.
        start: the start checkpoint, for the message.

    Raises:
        InputError: there is such an entry and none that fits.
    """
    if (entry.folder / RECORD).is_file():
        return
    for path in sorted(entry.folder.parent.glob(f"*/{RECORD}")):
        try:
            other = json.loads(path.read_text(encoding="utf-8"))["settings"]
            changed = [name for name, value in entry.settings.items() if other.get(name) != value]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # a damaged one of another name is in nobody's way
        said = "; ".join(
            f"{name} was {_short(other.get(name))} and is {_short(entry.settings[name])}" for name in changed
        )
        what = f"holds the reference log-probs of source {entry.label!r} computed otherwise than from {start}: {said}"
        remedy = (
            f"Start from the weights that they are of, give another reference.folder (or none: a cache keeps them "
            f"apart), or remove {path.parent}."
        )
        raise InputError(str(entry.root), what, remedy)


def _short(value: Value) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)


class _Busy(Exception):
    """Another process holds the entry."""


def _busy() -> None:
    raise _Busy


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
