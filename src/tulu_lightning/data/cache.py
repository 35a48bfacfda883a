"""Tokenised rows by content: what was tokenised once is mapped again, whichever run asks and wherever the rows lie.

An entry is a folder named by a hash of everything that decides its tokens (`keys.key`). It is built in chunks of rows. After
each one a journal says how far the files are good, so a killed build goes on with the next chunk; the finished folder is
renamed into its place. Processes that want the same entry wait for the one that builds it.
"""

import dataclasses
import json
import os
import shutil
import sys
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from tulu_lightning.assets.cache import cache_dir, locked, writing
from tulu_lightning.data.intake import Counts, LeftOut
from tulu_lightning.data.store import Part, Store, Summary, Writer, expected_sizes
from tulu_lightning.errors import InputError
from tulu_lightning.files import write_whole
from tulu_lightning.progress import Progress

__all__ = ["Entry", "Job", "Kept", "load_or_build", "tokens_dir"]

CHUNK = 1024
"""Rows of a chunk: what the tokenizer gets at once."""
SMALLEST_CHUNK = 64
AHEAD = 3
"""Chunks in work, and so what a kill can cost: one is stored, the next tokenised, the one after that read."""
JOURNAL, ENTRY = "journal.json", "entry.json"


class Kept(NamedTuple):
    """A row that is kept: its segments."""

    parts: tuple[Part, ...]
    truncated: bool = False
    """Whether its end was cut off."""


class Job(NamedTuple):
    """How to build an entry."""

    label: str
    """Name of the source, for people."""
    rows: int
    """Rows that the source has."""
    order: Sequence[int]
    """Which of them are tried, in order."""
    wanted: int | None
    """Stop when so many are kept."""
    encode: Callable[[Any], Sequence[Kept | LeftOut]]
    """One outcome for each row of a chunk that was read; raises InputError for a bad one."""
    read: Callable[[Sequence[int]], Any] = lambda indices: indices
    """The given rows, as `encode` wants them; raises InputError for a bad one. Runs beside `encode`, in order like it."""


class Entry(NamedTuple):
    """A finished entry."""

    store: Store
    counts: Counts
    digest: str
    """Hash of the kept rows as they are trained on."""


def tokens_dir() -> Path:
    """`$TULU_TOKENS`, or `tokens` in the cache; not created here."""
    given = os.environ.get("TULU_TOKENS")
    return Path(given).expanduser() if given else cache_dir() / "tokens"


# Entries ----------------------------------------------------------------------------------------------------------


def load_or_build(name: str, job: Job) -> Entry:
    """The entry of that name, built by the first process that finds it missing or damaged.

    Args:
        name: from `keys.key`.
        job: how to build it.

    Raises:
        InputError: a row is bad (nothing is kept, the rows have to change), or the cache cannot be written (what was
            finished is kept).
    """
    final = tokens_dir() / name
    if (entry := _open(final, job.label)) is not None:
        return entry
    waiting = f"source {job.label!r}: another process is tokenising these rows ({final}); waiting for it"
    with ExitStack() as held:
        with _writing():
            final.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(final.with_name(f".{name}.lock"), lambda: _say(waiting)))
        if (entry := _open(final, "")) is not None:  # it appeared while we waited
            return entry
        building = final.with_name(f".{name}.building")
        _build(building, job)
        with _writing():
            shutil.rmtree(final, ignore_errors=True)  # a damaged one
            building.rename(final)
    entry = _open(final, job.label)
    assert entry is not None
    return entry


def _open(folder: Path, label: str) -> Entry | None:
    """An entry if it is whole; one that is there and is not is reported, unless there is no label."""
    if not folder.is_dir():
        return None
    try:
        known = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
        summary, counts = Summary(**known["summary"]), _counts(known["counts"])
        wrong = _wrong_sizes(folder, summary)
        digest = str(known["digest"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        wrong, summary, counts, digest = f"{ENTRY} cannot be read ({type(error).__name__})", Summary(), Counts(), ""
    if not wrong:
        return Entry(Store(folder, summary), counts, digest)
    if label:
        _say(f"source {label!r}: its tokens in the cache are damaged ({folder}: {wrong}); tokenising it again")
    return None


def _wrong_sizes(folder: Path, summary: Summary, exact: bool = True) -> str:
    """What is wrong with the first file that is not as long as it must be; may it be longer, if not `exact`."""
    for file, size in expected_sizes(summary).items():
        path = folder / file
        found = path.stat().st_size if path.is_file() else -1
        if found < size or (exact and found != size):
            return f"{file} is missing" if found < 0 else f"{file} has {found} bytes instead of {size}"
    return ""


def _counts(known: Mapping[str, Any]) -> Counts:
    return Counts(**{**known, "left_out": Counter(known["left_out"])})


def _writing() -> AbstractContextManager[None]:
    return writing(tokens_dir(), "TULU_TOKENS or TULU_CACHE")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _BadRow(Exception):
    """An InputError about a row, told apart from those about the disk."""

    def __init__(self, error: InputError) -> None:
        super().__init__(str(error))
        self.error = error


# Building ---------------------------------------------------------------------------------------------------------


def _build(folder: Path, job: Job) -> None:
    """Fill the folder, going on where an earlier build stopped; it is an entry but for its name then."""
    summary, counts = _resume(folder, job)
    try:
        with _writer(folder, summary) as writer:
            _encode_all(folder, job, writer, counts)
            summary = writer.summary
    except _BadRow as bad:  # the source or a setting has to change, and then this is no part of anything
        shutil.rmtree(folder, ignore_errors=True)
        raise bad.error from None
    with _writing():
        digest = Store(folder, summary).content_digest()
        _write(folder / ENTRY, {**_state(summary, counts), "digest": digest, "source": job.label})
        (folder / JOURNAL).unlink(missing_ok=True)


def _resume(folder: Path, job: Job) -> tuple[Summary, Counts]:
    with suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
        summary, counts = Summary(**known["summary"]), _counts(known["counts"])
        if not _wrong_sizes(folder, summary, exact=False):
            return summary, counts
    with _writing():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    return Summary(), Counts(rows=job.rows)


def _writer(folder: Path, summary: Summary) -> Writer:
    with _writing():
        return Writer(folder, summary)


def _encode_all(folder: Path, job: Job, writer: Writer, counts: Counts) -> None:
    total = len(job.order) if job.wanted is None else min(len(job.order), job.wanted)
    label, unit = f"tokenising {job.label}", "rows"
    with Progress(label, total, _done(job, counts), unit=unit) as progress, closing(_outcomes(job, counts)) as chunks:
        for chunk, outcomes in chunks:
            kept = counts.take(outcomes, job.wanted)
            with _writing():
                writer.append([row.parts for _, row in kept], [int(chunk[place]) for place, _ in kept])
                _write(folder / JOURNAL, _state(writer.summary, counts))
            if len(job.order) > CHUNK:  # what is done in a moment needs no line
                progress.update(_done(job, counts))


def _outcomes(job: Job, counts: Counts) -> Generator[tuple[Sequence[int], Sequence[Kept | LeftOut]], None, None]:
    """Chunks and their outcomes, in order; `counts` says how far the caller has stored them.

    The tokenizer leaves Python alone while it works, so reading goes on beside it.
    """
    start, waiting = counts.tried, deque[tuple[Sequence[int], Future[Sequence[Kept | LeftOut]]]]()
    readers, encoders = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    try:
        while True:
            while len(waiting) < AHEAD and start < len(job.order):
                size = CHUNK
                if job.wanted is not None:  # of rows that may not be needed none is read
                    missing = job.wanted - counts.kept - sum(len(chunk) for chunk, _ in waiting)
                    if missing <= 0:
                        break
                    size = min(CHUNK, max(SMALLEST_CHUNK, missing))
                chunk = job.order[start : start + size]
                start += len(chunk)
                read = readers.submit(job.read, chunk)
                waiting.append((chunk, encoders.submit(lambda read=read: job.encode(read.result()))))
            if not waiting:
                return
            chunk, outcomes = waiting.popleft()
            try:
                found = outcomes.result()
            except InputError as error:
                raise _BadRow(error) from error
            yield chunk, found
    finally:
        for pool in (encoders, readers):
            pool.shutdown(cancel_futures=True)


def _done(job: Job, counts: Counts) -> int:
    return counts.tried if job.wanted is None else counts.kept


def _state(summary: Summary, counts: Counts) -> dict[str, Any]:
    return {"summary": dataclasses.asdict(summary), "counts": {**vars(counts), "left_out": dict(counts.left_out)}}


def _write(path: Path, values: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(values, indent=1))
