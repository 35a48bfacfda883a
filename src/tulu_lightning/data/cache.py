"""Tokenised rows by content: what was tokenised once is mapped again, whichever run asks and wherever the rows lie.

An entry is a folder named by a hash of everything that decides its tokens (`key`). It is built in chunks of rows. After
each one a journal says how far the files are good, so a killed build goes on with the next chunk; the finished folder is
renamed into its place. Processes that want the same entry wait for the one that builds it.
"""

import dataclasses
import hashlib
import importlib.util
import inspect
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from transformers import PreTrainedTokenizerBase

from tulu_lightning.assets.cache import cache_dir, locked, writing
from tulu_lightning.data.intake import Counts, LeftOut
from tulu_lightning.data.store import Part, Store, Summary, Writer, expected_sizes
from tulu_lightning.errors import InputError
from tulu_lightning.progress import Progress

__all__ = ["Entry", "Job", "Kept", "code_digest", "key", "load_or_build", "tokenizer_digest", "tokens_dir"]

FORMAT = 1
"""Of the files; entries of another one are not looked at."""
CHUNK = 2000
"""Rows of a chunk: what a kill can cost, and what the tokenizer gets at once."""
SMALLEST_CHUNK = 64
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
    encode: Callable[[Sequence[int]], Sequence[Kept | LeftOut]]
    """One outcome for each of the given rows; raises InputError for a bad one."""


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


# What decides the tokens ------------------------------------------------------------------------------------------


def key(parts: Mapping[str, Any]) -> str:
    """The name of an entry: a hash of plain values, of the format and of the tokenizing library's version."""
    everything = {"format": FORMAT, "tokenizers": tokenizers.__version__, **parts}
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that a tokenizer knows (vocabulary, merges, special tokens), wherever it lies. Hexadecimal."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps({name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True)
    return hashlib.sha256(f"{type(tokenizer).__name__}\n{special}\n{known}".encode()).hexdigest()


def code_digest(*parts: Any) -> str:
    """Hash of the source that turns rows into tokens: this folder's, and that of what a user adds to it.

    A change of the code makes new entries, so a stale one is never used and nobody has to raise a number.

    Args:
        parts: classes (a user's data module), or texts that may be import paths (a reader, a filter); others are
            passed over.
    """
    digest = hashlib.sha256(_own_code().encode())
    for part in parts:
        if isinstance(part, type):
            modules = {base.__module__ for base in part.__mro__ if base is not object}
            for module in sorted(modules - {"typing", "builtins"}):
                if module.partition(".")[0] not in ("lightning", "torch", "tulu_lightning"):
                    digest.update(_module_code(module, part))
        elif isinstance(part, str) and all(name.isidentifier() for name in part.split(".")) and "." in part:
            digest.update(_module_code(part.rpartition(".")[0]))
    return digest.hexdigest()


@cache
def _own_code() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _module_code(module: str, part: type | None = None) -> bytes:
    with suppress(ImportError, ValueError, AttributeError):
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin and Path(spec.origin).is_file():
            return Path(spec.origin).read_bytes()
    with suppress(OSError, TypeError):  # a notebook's cells are no file
        return inspect.getsource(part).encode() if part is not None else b""
    return b""


# Entries ----------------------------------------------------------------------------------------------------------


def load_or_build(name: str, job: Job) -> Entry:
    """The entry of that name, built by the first process that finds it missing or damaged.

    Args:
        name: from `key`.
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


# Building ---------------------------------------------------------------------------------------------------------


def _build(folder: Path, job: Job) -> None:
    """Fill the folder, going on where an earlier build stopped; it is an entry but for its name then."""
    summary, counts = _resume(folder, job)
    with _writer(folder, summary) as writer:
        _encode_all(folder, job, writer, counts)
        summary = writer.summary
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
    with Progress(f"tokenising {job.label}", total, done=_done(job, counts), unit="rows") as progress:
        while counts.tried < len(job.order) and (job.wanted is None or counts.kept < job.wanted):
            size = CHUNK if job.wanted is None else min(CHUNK, max(SMALLEST_CHUNK, job.wanted - counts.kept))
            chunk = job.order[counts.tried : counts.tried + size]
            try:
                kept = counts.take(job.encode(chunk), job.wanted)
            except InputError:  # the source or a setting has to change, and then this is no part of anything
                shutil.rmtree(folder, ignore_errors=True)
                raise
            with _writing():
                writer.append([row.parts for _, row in kept], [int(chunk[place]) for place, _ in kept])
                _write(folder / JOURNAL, _state(writer.summary, counts))
            if len(job.order) > CHUNK:  # what is done in a moment needs no line
                progress.update(_done(job, counts))


def _done(job: Job, counts: Counts) -> int:
    return counts.tried if job.wanted is None else counts.kept


def _state(summary: Summary, counts: Counts) -> dict[str, Any]:
    return {"summary": dataclasses.asdict(summary), "counts": {**vars(counts), "left_out": dict(counts.left_out)}}


def _write(path: Path, values: Mapping[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(values, indent=1), encoding="utf-8")
    beside.replace(path)
