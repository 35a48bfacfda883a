"""Going through a source's rows for what they repeat of the evaluation sets.

A source is gone through in blocks of rows; each block's findings are a file in the cache, named by the content of the rows, the
evaluation sets and the rule. So a scan that is stopped goes on, several processes or machines take different blocks, and what
was looked at once is not looked at again.
"""

import dataclasses
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

from tulu_lightning.assets.cache import build_once, cache_dir, writing
from tulu_lightning.data.decontaminate_settings import Decontaminate
from tulu_lightning.data.decontaminate_texts import items_of, pieces_of, turns_of
from tulu_lightning.data.keys import key
from tulu_lightning.data.ngram_index import Index, Set, write_index
from tulu_lightning.data.overlap import Overlaps, Rule, overlaps
from tulu_lightning.data.similar import identity, similar
from tulu_lightning.data.sources import Source, Table, open_source
from tulu_lightning.errors import RunStopped
from tulu_lightning.progress import Progress

__all__ = ["Findings", "Scan", "evaluation_index", "find", "open_scan", "processes_of"]

BLOCK = 8192
"""Rows of a block: what a kill can cost."""
MAPPED = 16
"""Blocks after which a process opens a source anew: what it read of a mapped file counts as its memory until then."""
VERSION = 2
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


_given: tuple[Source, Path, Decontaminate, Path] | None = None
_scan: Scan | None = None
_left = 0
"""Blocks until the rows are opened anew."""


def _start(*given: Any) -> None:
    global _given
    _given = given


def _work(block: int) -> int:
    global _scan, _left
    if _left == 0:
        assert _given is not None
        source, index, settings, folder = _given
        _scan = None  # lets go of the file before it is mapped again
        table = open_source(dataclasses.replace(source, decontaminate=None))
        _scan, _left = Scan(source, table, Index(index), settings, folder), MAPPED
    assert _scan is not None
    _block(_scan, block)
    _left -= 1
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
