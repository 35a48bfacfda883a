"""Where rows come from: a set on the hub, a local file of any common format, or a function that makes them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tulu_lightning.data.criteria import Keywords, Predicate
from tulu_lightning.data.decontaminate_settings import Decontaminate
from tulu_lightning.data.importing import check_call, find_function
from tulu_lightning.data.table import ListRows, Row, Rows, Table, plain
from tulu_lightning.errors import InputError, nearest

__all__ = [
    "FORMATS",
    "PAIR_FORMATS",
    "PROMPT_FORMATS",
    "SFT_FORMATS",
    "Row",
    "Source",
    "Table",
    "check_format",
    "check_settings",
    "load",
    "open_source",
]

SFT_FORMATS = ("messages", "sharegpt", "alpaca", "prompt_completion", "text")
PAIR_FORMATS = ("messages", "sharegpt", "ultrafeedback")
PROMPT_FORMATS = ("messages", "gsm8k", "math")
FORMATS = tuple(dict.fromkeys((*SFT_FORMATS, *PAIR_FORMATS, *PROMPT_FORMATS)))
"""What `Source.read` may say, beside an import path: for SFT, for preferences, for prompts, and all of it."""
READER_EXAMPLE = "my_package.readers.read_row"

MOST_TIMES = 1000
"""Largest `upsample`: an order of rows has an entry for each time that a row is used."""


@dataclass(frozen=True)
class Source:
    """One source of a mixture.

    Example: `Source("sums", rows="tulu_lightning.assets.arithmetic.sft_rows", args={"count": 200})`.
    """

    name: str
    """How tables and messages call it; unique within a mixture."""
    path: str | None = None
    """A local file by its name: .parquet, .arrow, .json (a list of objects), anything else JSON lines (one object a
    line), these and .json also packed as .gz or .zst; or a folder that `datasets` saved, or with *.arrow or *.parquet
    files; or a pattern for such files."""
    rows: str | None = None
    """Import path of a function that returns a list of rows."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of that function."""
    limit: int | None = None
    """Take only the first so many rows (of those that `match`); what follows counts from there."""
    hub: str | None = None
    """A set on the Hugging Face hub, such as allenai/tulu-3-sft-mixture."""
    subset: str | None = None
    """Configuration of the hub set, where it has several."""
    split: str | None = None
    """Split of the hub set, of a saved folder, or of one whose files are named by splits, as in a clone of a hub set
    (train-00000-of-00002.parquet, test-…); `train` if left out."""
    revision: str | None = None
    """Commit, tag or branch of the hub set."""
    read: str = "messages"
    """How a row is written. For SFT: messages, sharegpt, alpaca, prompt_completion, text (plain text, all of it trained).
    For preferences: messages, sharegpt, ultrafeedback. For prompts: messages, gsm8k, math. Or the import path of a
    function from a row to a row with `messages` (for preferences `chosen` and `rejected`), or to None to leave it
    out."""
    columns: dict[str, str] = field(default_factory=dict)
    """Where the fields are that the reader wants, if under other names: {messages: conversation}."""
    match: dict[str, str | list[str]] = field(default_factory=dict)
    """Only rows whose field has this value, or one of these: {source: oasst}."""
    fraction: float | None = None
    """Share of the rows to take, drawn by the seed: above 0, to 1."""
    count: int | None = None
    """Take exactly so many usable rows, drawn by the seed; fewer are an error."""
    cap: int | None = None
    """Take at most so many usable rows, drawn by the seed."""
    upsample: float = 1.0
    """How often a taken row is used: 10 takes each ten times, 2.5 each twice and half of them once more."""
    filters: list[Keywords | Predicate] = field(default_factory=list)
    """Which rows to leave out: {words: [...]} by keywords, {function: ...} by a function of yours. Of a pair, both
    conversations must pass."""
    decontaminate: Decontaminate | None = None
    """Leave out rows that repeat evaluation sets, before anything is drawn."""
    keep_empty: bool = False
    """Keep rows with an empty message; the paper filters them out of every set. A pair with an empty answer is never
    kept."""

    def row_name(self, number: int) -> str:
        """How an error names a row (from 1)."""
        return f"{self.path or f'source {self.name!r}'}, row {number}"

    def choices(self) -> dict[str, Any]:
        """The settings that decide which rows are taken and how they are read, as plain data; not where they are."""
        place = ("name", "path", "rows", "args", "hub", "subset", "split", "revision")
        return {name: value for name, value in asdict(self).items() if name not in place}


def open_source(source: Source) -> Table:
    """The rows of a source, each a dictionary; their fields are checked by the readers.

    Raises:
        InputError: settings that are out of range or do nothing; not exactly one of `path`, `hub` and `rows`; a file
            that is missing, unreadable, empty, or not what its name says; a function that cannot be found or called
            with `args`, or returns something else; a column that no row has; a value that no row matches.
    """
    check_settings(source)
    rows, digest = _open(source)
    where = source.path or f"source {source.name!r}"
    if not len(rows):
        raise InputError(where, "it is empty", "Give at least one row, or leave the source out.")
    for key, column in [*((key, column) for key, column in source.columns.items()), *((c, c) for c in source.match)]:
        if column not in rows.columns():
            setting = f"match names {column!r}" if column in source.match else f"columns says {key}: {column}"
            there = f"(there are {', '.join(rows.columns())})"
            raise InputError(where, f"{setting}, and no row has such a column {there}", nearest(column, rows.columns()))
    picked = _matching(where, source, rows)
    if source.limit is not None:
        picked = picked[: source.limit]
    settings = {name: value for name in ("match", "columns", "limit") if (value := getattr(source, name))}
    table = Table(rows, digest, picked, source.columns, settings)
    if source.decontaminate is None:
        return table
    from tulu_lightning.data.decontaminate import without_overlaps  # which opens sources itself

    return without_overlaps(source, table)


def load(source: Source) -> list[Row]:
    """All rows of a source at once.

    Raises:
        InputError: as `open_source`.
    """
    table = open_source(source)
    return table.take(range(len(table)))


def check_settings(source: Source) -> None:
    """Refuse settings that cannot be meant, before anything is opened.

    Raises:
        InputError: names the source, the setting and what would do.
    """
    where = f"source {source.name!r}"
    given = [name for name in ("path", "hub", "rows") if getattr(source, name) is not None]
    if len(given) != 1:
        found = f"both {' and '.join(given)} are given" if given else "neither path nor hub nor rows is given"
        raise InputError(where, found, "Give exactly one of them.")
    if source.args and not source.rows:
        remedy = f"Leave args out, or use rows instead of {given[0]}."
        raise InputError(where, f"args do nothing for a {'file' if source.path else 'hub set'}", remedy)
    for name in ("subset", "revision", *(["split"] if source.rows else [])):
        if getattr(source, name) is not None and not source.hub:
            raise InputError(where, f"{name} does nothing for a source without hub", f"Leave {name} out, or give hub.")
    _check_numbers(where, source)
    check_format(source, FORMATS, "any rows")
    if "." in source.read:
        find_function(f"{where}, read", source.read, READER_EXAMPLE)
    for criterion in source.filters:
        if isinstance(criterion, Predicate):
            criterion.find()


def check_format(source: Source, formats: Sequence[str], module: str) -> None:
    """Refuse a `read` that a data module (of that class) does not have; import paths pass.

    Raises:
        InputError: with the nearest of its formats.
    """
    if "." in source.read or source.read in formats:
        return
    of = f" for {module}" if source.read in FORMATS else ""
    remedy = f"{nearest(source.read, formats)} Or give the import path of a function, such as {READER_EXAMPLE}."
    raise InputError(f"source {source.name!r}", f"there is no format {source.read!r}{of}", remedy)


def _check_numbers(where: str, source: Source) -> None:
    for name in ("limit", "count", "cap"):
        value = getattr(source, name)
        if value is not None and value < 1:
            raise InputError(where, f"{name} is {value}", "Use at least 1, or leave it out.")
    if source.fraction is not None and not 0 < source.fraction <= 1:
        remedy = "It is a share of the rows: above 0, to 1. To use rows more than once, set upsample."
        raise InputError(where, f"fraction is {source.fraction}", remedy)
    if not 1 <= source.upsample <= MOST_TIMES:
        remedy = f"Use 1 to {MOST_TIMES:,}. To take fewer rows, set fraction, count or cap."
        raise InputError(where, f"upsample is {source.upsample}", remedy)
    both = [name for name in ("fraction", "count", "cap") if getattr(source, name) is not None]
    if len(both) > 1:
        raise InputError(where, f"both {' and '.join(both)} are given", "Give one of them.")


def _open(source: Source) -> tuple[Rows, str]:
    where = f"source {source.name!r}"
    if source.rows is not None:
        rows = ListRows(_call(source, where, source.rows))
        return rows, rows.digest()
    from tulu_lightning.data.files import open_file, open_hub  # `datasets` takes a second to import

    if source.path is not None:
        return open_file(source.path, source.split, source.row_name)
    return open_hub(where, str(source.hub), source.subset, source.split, source.revision)


def _call(source: Source, where: str, import_path: str) -> list[Row]:
    function = find_function(where, import_path, "tulu_lightning.assets.arithmetic.sft_rows")
    check_call(where, import_path, function, source.args)
    try:
        rows = function(**source.args)
    except InputError:
        raise
    except Exception as error:
        what = f"{import_path} fails ({type(error).__name__}: {error})"
        raise InputError(where, what, "Correct the function, or its args.") from error
    if not isinstance(rows, list):
        raise InputError(where, f"{import_path} returned a {type(rows).__name__}", "It must return a list of rows.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            remedy = "Make every row an object with named fields."
            raise InputError(source.row_name(number), f"the row is a {type(row).__name__}, not an object", remedy)
    return rows


def _matching(where: str, source: Source, rows: Rows) -> Sequence[int]:
    """Indices of the rows that have every value that `match` asks for."""
    if not source.match:
        return range(len(rows))
    keep = np.ones(len(rows), dtype=bool)
    for column, wanted in source.match.items():
        accepted = {wanted} if isinstance(wanted, str) else set(wanted)
        values, codes = rows.codes(column)
        values = [plain(value) for value in values]
        for value in sorted(accepted.difference(values)):
            shown = [text for text in values if len(text) <= 80][:30]
            remedy = nearest(value, shown) if shown else "Match another column."
            raise InputError(where, f"no row has {value!r} as its {column!r}", remedy)
        keep &= np.isin(codes, [code for code, value in enumerate(values) if value in accepted])
    if not keep.any():
        raise InputError(where, f"no row matches all of {source.match}", "Ask for less.")
    return np.flatnonzero(keep)  # type: ignore[return-value]  an array is a sequence in all that is used here
