"""Decontamination: which rows of a source repeat items of evaluation sets (Tülu 3, section 3.2), and what is done about it.

A source is gone through in blocks of rows; each block's findings are a file in the cache, named by the content of the rows, the
evaluation sets and the rule. So a scan that is stopped goes on, several processes or machines take different blocks, and what
was looked at once is not looked at again.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from tulu_lightning.assets.cache import build_once, cache_dir, locked, writing
from tulu_lightning.data.decontaminate_settings import Decontaminate
from tulu_lightning.data.decontaminate_texts import items_of, pieces_of, turns_of
from tulu_lightning.data.keys import key
from tulu_lightning.data.ngram_index import Index, Set, write_index
from tulu_lightning.data.overlap import Overlaps, Rule, overlaps
from tulu_lightning.data.similar import identity, similar
from tulu_lightning.data.sources import Source, Table, open_source
from tulu_lightning.errors import InputError, RunStopped
from tulu_lightning.progress import Progress

__all__ = [
    "Findings",
    "Scan",
    "Verdict",
    "evaluation_index",
    "find",
    "open_scan",
    "processes_of",
    "rows_to_drop",
    "verdicts",
    "without_overlaps",
]

BLOCK = 8192
"""Rows of a block: what a kill can cost."""
VERSION = 1
"""Of what a block's file says."""


@dataclass(frozen=True)
class Scan:
    """One source held against the evaluation sets."""

    source: Source
    table: Table
    index: Index
    settings: Decontaminate
    folder: Path
    """Where the blocks' findings are kept."""

    @property
    def blocks(self) -> int:
        """How many there are."""
        return math.ceil(len(self.table) / BLOCK)

    def path(self, block: int) -> Path:
        """The file of a block."""
        return self.folder / f"{block:07d}.npz"


class Findings(NamedTuple):
    """All pairs of a row and a test item that overlap."""

    pairs: Overlaps
    """Rows by their index in the source's table."""
    turns: int
    """Turns that were looked at."""


def evaluation_index(settings: Decontaminate) -> Index:
    """The index of the evaluation sets: from the cache, or built.

    Raises:
        InputError: a set cannot be opened, or an item lacks a field.
    """
    tables = [open_source(each.source()) for each in settings.evaluations]
    asked = [
        {"name": each.name, "rows": table.fingerprint, "fields": each.fields}
        for each, table in zip(settings.evaluations, tables, strict=True)
    ]
    name = f"ngrams-{VERSION}-{key({'n': settings.n, 'sets': asked})}"

    def build(folder: Path) -> None:
        sets = [Set(each.name, items_of(each, table)) for each, table in zip(settings.evaluations, tables, strict=True)]
        write_index(folder, sets, settings.n)

    return Index(build_once(name, build))


def open_scan(source: Source, table: Table, index: Index, settings: Decontaminate) -> Scan:
    """What is to be done for a source."""
    rule: list[Any] = [settings.mode, settings.short, settings.item_share, settings.turns]
    if settings.mode == "embedding":
        rule += [settings.similarity, identity(settings)]
    asked = {
        "rows": table.fingerprint,
        "read": source.read,
        "index": index.folder.name,
        "rule": rule,
        "block": BLOCK,
        "version": VERSION,
    }
    return Scan(source, table, index, settings, cache_dir() / "overlaps" / key(asked))


def processes_of(scan: Scan) -> int:
    """How many look at a source at once; a model that embeds uses all CPUs, or the GPU, by itself."""
    many = scan.blocks > 16 and scan.settings.mode != "embedding"
    return scan.settings.processes or (os.cpu_count() or 1 if many else 1)


def find(scan: Scan, processes: int = 1, shard: tuple[int, int] = (0, 1)) -> Findings | None:
    """Go through the blocks that are not done yet.

    Args:
        scan: from `open_scan`.
        processes: how many work at it on this machine.
        shard: (i, n): only the blocks whose number is i modulo n.

    Returns:
        What was found; None if blocks of other shards are missing.

    Raises:
        InputError: a row is malformed, or the cache cannot be written.
        RunStopped: one of several processes was killed.
    """
    with writing():
        scan.folder.mkdir(parents=True, exist_ok=True)
    mine = [block for block in range(scan.blocks) if block % shard[1] == shard[0]]
    missing = [block for block in mine if not scan.path(block).exists()]
    if missing:
        with Progress(f"comparing {scan.source.name}", len(mine), len(mine) - len(missing), unit="blocks") as progress:
            for done, _ in enumerate(_done(scan, missing, processes), len(mine) - len(missing) + 1):
                if len(mine) > 1:
                    progress.update(done)
    return _collect(scan) if all(scan.path(block).exists() for block in range(scan.blocks)) else None


def _done(scan: Scan, blocks: Sequence[int], processes: int) -> Iterator[int]:
    if processes == 1 or len(blocks) == 1:
        for block in blocks:
            _block(scan, block)
            yield block
        return
    given = (scan.source, scan.index.folder, scan.settings, scan.folder)
    pool = ProcessPoolExecutor(min(processes, len(blocks)), get_context("spawn"), _start, given)
    try:
        running = {pool.submit(_work, block) for block in blocks}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        what = "a process that compares rows was killed, perhaps for want of memory (--processes 1 takes the least)"
        raise RunStopped(f"{scan.source.name}: {what}; the same command goes on with the next block") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_scan: Scan | None = None


def _start(source: Source, index: Path, settings: Decontaminate, folder: Path) -> None:
    global _scan
    table = open_source(dataclasses.replace(source, decontaminate=None))
    _scan = Scan(source, table, Index(index), settings, folder)


def _work(block: int) -> int:
    assert _scan is not None
    _block(_scan, block)
    return block


def _block(scan: Scan, block: int) -> None:
    start = block * BLOCK
    indices = range(start, min(start + BLOCK, len(scan.table)))
    rows = [
        turns_of(scan.source, scan.table.number(index), row, scan.settings.turns)
        for index, row in zip(indices, scan.table.take(indices), strict=True)
    ]
    found = [(first, _compare(scan, chunk)) for first, chunk in pieces_of(rows)]
    columns = {
        "rows": np.concatenate([pairs.rows_P + first + start for first, pairs in found]),
        "items": np.concatenate([pairs.items_P for _, pairs in found]),
        "shares": np.concatenate([pairs.shares_P for _, pairs in found]),
    }
    path = scan.path(block)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    columns["turns"] = np.array(sum(map(len, rows)))
    with writing(), beside.open("wb") as file:
        np.savez(file, **columns)  # type: ignore[arg-type]  no column is called allow_pickle
    beside.replace(path)


def _compare(scan: Scan, rows: Sequence[Sequence[str]]) -> Overlaps:
    settings = scan.settings
    if settings.mode == "embedding":
        return similar(scan.index, rows, settings)
    return overlaps(scan.index, rows, Rule(settings.mode, settings.short, settings.item_share))


def _collect(scan: Scan) -> Findings:
    parts = []
    for block in range(scan.blocks):
        with np.load(scan.path(block), allow_pickle=False) as known:
            parts.append({name: known[name] for name in ("rows", "items", "shares", "turns")})
    columns = (np.concatenate([part[name] for part in parts]) for name in ("rows", "items", "shares"))
    return Findings(Overlaps(*columns), int(sum(part["turns"] for part in parts)))


# Consequences -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """One source against one evaluation set."""

    name: str
    """Of the set."""
    items: int
    """That it has."""
    hit: int
    """Items of it that overlap with some row."""
    rows: int
    """Rows that overlap with some item of it."""
    contaminated: bool
    """Whether more than the allowed share of the items is hit."""

    @property
    def share(self) -> float:
        """Of its items that are hit."""
        return self.hit / self.items


def verdicts(scan: Scan, findings: Findings) -> list[Verdict]:
    """One for each evaluation set."""
    found: list[Verdict] = []
    bounds = scan.index.first_items
    for place, name in enumerate(scan.index.names):
        mine = (findings.pairs.items_P >= bounds[place]) & (findings.pairs.items_P < bounds[place + 1])
        items = int(bounds[place + 1] - bounds[place])
        hit, rows = (len(np.unique(column[mine])) for column in (findings.pairs.items_P, findings.pairs.rows_P))
        found.append(Verdict(name, items, hit, rows, hit / items > scan.settings.set_share))
    return found


def rows_to_drop(scan: Scan, findings: Findings) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Indices of the rows that overlap with an item of a set that the source contaminates, ascending."""
    bad = np.array([verdict.contaminated for verdict in verdicts(scan, findings)])
    sets = np.searchsorted(scan.index.first_items, findings.pairs.items_P, side="right") - 1
    return np.unique(findings.pairs.rows_P[bad[sets]])


def without_overlaps(source: Source, table: Table) -> Table:
    """A source's rows as its `decontaminate` wants them: the step of a mixture.

    Raises:
        InputError: the action is `drop_source` and the source contaminates a set; or as `find`.
    """
    settings = source.decontaminate
    assert settings is not None
    scan = open_scan(source, table, evaluation_index(settings), settings)
    with writing():
        scan.folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(
            scan.folder.with_name(f".{scan.folder.name}.lock")
        ):  # the ranks of a run: one looks, the others wait
            findings = find(scan, processes_of(scan))
    assert findings is not None
    bad = [verdict for verdict in verdicts(scan, findings) if verdict.contaminated]
    told = ", ".join(f"{each.hit:,} of {each.items:,} items of {each.name}" for each in bad)
    dropped = rows_to_drop(scan, findings)
    if not bad or settings.action == "report":
        rank_zero_info(f"source {source.name!r} repeats {told or 'no evaluation set'}")
        return table
    if settings.action == "drop_source":
        remedy = "Leave the source out, or set decontaminate.action: drop_rows."
        raise InputError(f"source {source.name!r}", f"it repeats {told}", remedy)
    rank_zero_info(f"source {source.name!r} repeats {told}: {len(dropped):,} of {len(table):,} rows left out")
    digest = hashlib.sha256(json.dumps([scan.folder.name, settings.set_share]).encode()).hexdigest()
    return table.without(dropped, digest)
