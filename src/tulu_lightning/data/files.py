"""Files and hub sets, opened through the `datasets` library.

What it makes of a file is used only where it gives the file's own rows (`data/faithful.py`). Reading JSON lines it takes
text that looks like a date for a date, makes floats of integers that share a field with floats, skips empty lines, and
fills a row that is null with nulls; then, and where it gives up, Python reads the file: exactly, and with an error that
names the row.

What it writes is kept in our cache folder by the file's content; small files leave nothing behind.
"""

import glob
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.packaged_modules.json.json import JsonConfig
from datasets.table import InMemoryTable

from tulu_lightning.assets.cache import build_once, cache_dir
from tulu_lightning.data.faithful import faithful
from tulu_lightning.data.jsonl import count_lines, digest_of, read_lines, read_list, starts_a_list
from tulu_lightning.data.table import ArrowRows, ListRows, Rows
from tulu_lightning.errors import InputError, nearest

__all__ = ["hub_set", "open_file", "open_hub"]

SMALL = 32 << 20
"""Bytes up to which a file's rows are held in memory; those of a larger one are memory-mapped from the cache."""
SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")
"""Name of one of several files of a split."""
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
"""Names of splits that are known as such without a shard's number behind them."""
JSON_SUFFIXES = (".json", ".json.gz", ".json.zst")


def open_file(path: str, split: str | None, row_name: Callable[[int], str]) -> tuple[Rows, str]:
    """The rows of a local file or folder, and a hash of its bytes.

    Args:
        path: JSON lines (plain, .gz or .zst), .json, .parquet, .arrow, or an Arrow folder; the last three may be a
            pattern such as `train-*.parquet`.
        split: which part of a `DatasetDict` folder, or of one whose files' names tell splits apart.
        row_name: how an error names a row, from 1.

    Raises:
        InputError: it is missing, cannot be read, or is not what its name says.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        return _open_folder(file, split)
    if split is not None:
        raise InputError(path, f"split is {split!r}, and a file has none", "Leave split out.")
    suffix = file.suffix
    if suffix in (".parquet", ".arrow"):
        files = [file] if file.is_file() else [Path(found) for found in sorted(glob.glob(str(file), recursive=True))]
        return _open_all(files or [file], suffix)
    if file.name.endswith(JSON_SUFFIXES) and starts_a_list(file):
        # `datasets` would read a list as a whole too, by a library that takes text for rows and drops lone surrogates
        return ListRows(_objects(read_list(file), row_name)), digest_of([file])
    return _open_json_lines(file, row_name)


def open_hub(where: str, hub: str, subset: str | None, split: str | None, revision: str | None) -> tuple[Rows, str]:
    """The rows of a set on the hub, and a hash of what `datasets` and the revision say it is.

    The files themselves stay where huggingface_hub keeps them (HF_HOME); a set that was fetched once opens offline.

    Raises:
        InputError: it is not there, or cannot be reached.
    """
    try:
        data = hub_set(hub, subset, split or "train", revision)
    except Exception as error:  # the hub's client and `datasets` raise whatever they meet
        what = f"{hub} cannot be had from the hub ({_reason(error)})"
        remedy = (
            "Check hub, subset, split and revision, the network, and for a gated set your HF_TOKEN; "
            "or fetch its files and give their path."
        )
        raise InputError(where, what, remedy) from error
    if not isinstance(data, datasets.Dataset):
        raise InputError(where, f"{hub} is a {type(data).__name__}", "Name one split of it.")
    return ArrowRows(data), hashlib.sha256(f"{data._fingerprint} {revision}".encode()).hexdigest()


@cache  # sources that take one set apart ask for it once, and get one revision of it
def hub_set(hub: str, subset: str | None, split: str, revision: str | None) -> Any:
    """What `datasets` gives for a hub set; the rows that it unpacks are kept in our cache folder."""
    with _quiet():
        folder = str(cache_dir() / "datasets" / "hub")
        return datasets.load_dataset(hub, subset, split=split, revision=revision, cache_dir=folder)


# JSON ---------------------------------------------------------------------------------------------------------------


def _open_json_lines(path: Path, row_name: Callable[[int], str]) -> tuple[Rows, str]:
    digest, lines = digest_of([path]), count_lines(path)
    data = _json_through_datasets(path, digest) if lines else None
    if data is not None and len(data) == lines:
        return ArrowRows(data), digest
    return ListRows(_objects(read_lines(path, row_name), row_name)), digest


def _objects(rows: Any, row_name: Callable[[int], str]) -> list[dict[str, Any]]:
    found = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            remedy = "Make every row an object with named fields."
            raise InputError(row_name(number), f"the row is a {type(row).__name__}, not an object", remedy)
        found.append(row)
    return found


def _json_through_datasets(path: Path, digest: str) -> datasets.Dataset | None:
    """What `datasets` reads, or None if it fails or changes something on the way."""
    # It would turn files that look like the traces of an agent into something else.
    options = {"parse_agent_traces": False} if "parse_agent_traces" in JsonConfig.__dataclass_fields__ else {}
    try:
        data = _load("json", [path], digest, **options)
    except InputError:  # the cache cannot be written
        raise
    except Exception:  # StopIteration for an empty file, ujson's, Arrow's: Python says what it is
        return None
    return data if faithful(data, path) else None


# Parquet and Arrow --------------------------------------------------------------------------------------------------


def _open_folder(folder: Path, split: str | None) -> tuple[Rows, str]:
    if (folder / "dataset_dict.json").is_file():
        present = [path.name for path in folder.iterdir() if path.is_dir()]
        chosen = split or "train"
        if chosen not in present:
            raise InputError(str(folder), f"the folder has no split {chosen!r}", nearest(chosen, present))
        return _open_folder(folder / chosen, None)
    # What `datasets` writes beside a set's rows when it filters or maps them is not part of the set.
    arrows = sorted(path for path in folder.glob("*.arrow") if not path.name.startswith("cache-"))
    if (folder / "state.json").is_file():
        _without_split(folder, split)
        with _naming(folder):
            data = datasets.load_from_disk(str(folder))
        assert isinstance(data, datasets.Dataset)  # a DatasetDict has no state.json
        return ArrowRows(data), digest_of(arrows)
    for suffix, files in ((".arrow", arrows), (".parquet", sorted(folder.glob("*.parquet")))):
        if files:
            return _open_all(_of_split(folder, files, split), suffix)
    remedy = "Give a file, or a folder with *.arrow or *.parquet files (such as datasets' save_to_disk writes)."
    raise InputError(str(folder), "the folder has no rows that can be read", remedy)


def _without_split(folder: Path, split: str | None) -> None:
    if split is not None:
        raise InputError(str(folder), f"split is {split!r}, and the folder has none", "Leave split out.")


def _of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """The files of one split, where their names tell several apart, as in a clone of a hub set; else all of them."""
    names = [_split_name(file) for file in files]
    present = sorted({name for name in names if name is not None})
    if len(present) < 2 and (split is None or split not in present):
        _without_split(folder, split)
        return files
    chosen = split or "train"
    if chosen not in present:
        remedy = (
            f"{nearest(chosen, present)} Or give a pattern for the files that you want, such as *{files[0].suffix}."
        )
        raise InputError(str(folder), f"its files are of the splits {', '.join(present)}, not {chosen!r}", remedy)
    if None in names:
        what = f"{files[names.index(None)].name} tells no split, beside files of {', '.join(present)}"
        raise InputError(str(folder), what, "Move it, or give a pattern for the files that you want.")
    return [file for file, name in zip(files, names, strict=True) if name == chosen]


def _split_name(file: Path) -> str | None:
    """The split in the name of a file that `datasets` or the hub wrote: (set-)split(-00000-of-00001(-hash)).suffix."""
    sharded = SHARD.fullmatch(file.stem)
    name = (sharded[1] if sharded else file.stem).rpartition("-")[2]
    return name if sharded or name in SPLITS else None


def _open_all(files: list[Path], suffix: str) -> tuple[Rows, str]:
    digest = digest_of(files)
    if suffix == ".parquet":
        with _naming(files[0]):
            return ArrowRows(_load("parquet", files, digest)), digest
    tables = []
    for file in files:
        with _naming(file):
            tables.append(_open_arrow(file))
    with _naming(files[0]):
        return ArrowRows(datasets.concatenate_datasets(tables)), digest


def _open_arrow(file: Path) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_file(str(file))
    except pa.ArrowInvalid:  # it reads Arrow's stream format only, which is what `datasets` writes
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        return datasets.Dataset(InMemoryTable(table))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except InputError:
        raise
    except Exception as error:
        remedy = f"Give a whole {path.suffix or 'Arrow'} file; several must have the same columns."
        raise InputError(str(path), f"it cannot be read ({_reason(error)})", remedy) from error


# The library --------------------------------------------------------------------------------------------------------


def _load(kind: str, files: Sequence[Path], digest: str, **options: Any) -> datasets.Dataset:
    """Files of one kind as one data set: in memory if they are small, else memory-mapped from the cache."""
    arguments: dict[str, Any] = {"data_files": [glob.escape(os.path.abspath(file)) for file in files], "split": "train"}

    def build(folder: Path) -> None:
        work = folder / "work"
        datasets.load_dataset(kind, cache_dir=str(work), **arguments, **options).save_to_disk(str(folder / "rows"))
        shutil.rmtree(work)

    with _quiet():
        if sum(file.stat().st_size for file in files) <= SMALL:
            with tempfile.TemporaryDirectory() as folder:
                return datasets.load_dataset(kind, cache_dir=folder, keep_in_memory=True, **arguments, **options)
        loaded = datasets.load_from_disk(str(build_once(f"datasets-{kind}-{digest[:32]}", build) / "rows"))
        assert isinstance(loaded, datasets.Dataset)
        return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no log lines of `datasets`: what matters is in our own errors. The hub's own show a download."""
    bars = datasets.are_progress_bars_disabled()
    level = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # `datasets` wraps what it met in "an error occurred"
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
