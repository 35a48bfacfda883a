"""Decontamination: which rows of a source repeat items of evaluation sets (Tülu 3, section 3.2), and what is done about it."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from tulu_lightning.assets.cache import locked, writing
from tulu_lightning.data.decontaminate_scan import Findings, Scan, evaluation_index, find, open_scan, processes_of
from tulu_lightning.data.sources import Source, Table
from tulu_lightning.errors import InputError

__all__ = ["Verdict", "rows_to_drop", "verdicts", "without_overlaps"]


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
        InputError: the action is `drop_source` and the source contaminates a set; all rows would be dropped; or as
            `find`.
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
    found = verdicts(scan, findings)
    bad = [verdict for verdict in found if verdict.contaminated]
    told = ", ".join(f"{each.hit:,} of {each.items:,} items of {each.name}" for each in bad)
    dropped = rows_to_drop(scan, findings)
    if not bad or settings.action == "report":
        few = ", ".join(f"{each.hit:,} of {each.items:,} items of {each.name}" for each in found if each.hit)
        allowed = f"{few}: no set above {settings.set_share:.1%}, so all rows stay" if few else "no evaluation set"
        rank_zero_info(f"source {source.name!r} repeats {told or allowed}")
        return table
    if settings.action == "drop_source":
        remedy = "Leave the source out, or set decontaminate.action: drop_rows."
        raise InputError(f"source {source.name!r}", f"it repeats {told}", remedy)
    if len(dropped) == len(table):
        what = f"it repeats {told}, and so does each of its {len(table):,} rows"
        raise InputError(
            f"source {source.name!r}", what, "Leave the source out, or look whether it is that set itself."
        )
    rank_zero_info(f"source {source.name!r} repeats {told}: {len(dropped):,} of {len(table):,} rows left out")
    digest = hashlib.sha256(json.dumps([scan.folder.name, settings.set_share]).encode()).hexdigest()
    return table.without(dropped, digest)
