"""`tulu data decontaminate`: a stage's sources held against evaluation sets; report, and rows without what overlaps."""

import argparse
import dataclasses
import gzip
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from tulu_lightning.core.settings import require
from tulu_lightning.data.base import StepData
from tulu_lightning.data.decontaminate import rows_to_drop, verdicts
from tulu_lightning.data.decontaminate_report import as_html, as_text, report_of
from tulu_lightning.data.decontaminate_scan import Findings, Scan, evaluation_index, find, open_scan, processes_of
from tulu_lightning.data.decontaminate_settings import Decontaminate
from tulu_lightning.data.decontaminate_texts import turns_of
from tulu_lightning.data.sources import Source, open_source
from tulu_lightning.errors import InputError, nearest
from tulu_lightning.evaluation.rows import check_used, use_file
from tulu_lightning.files import put_in_place, remove, write_whole
from tulu_lightning.launch.data import _DataOnly
from tulu_lightning.launch.parser import in_own_words

__all__ = ["run"]

USAGE = """\
usage: tulu data decontaminate --config FILE --against FILE [--out FOLDER] [--action report|drop_rows|drop_source]
           [--mode ngram|exact|embedding] [--embedding-model FOLDER] [--similarity X] [--turns user|all]
           [--item-share X] [--set-share X] [--n N] [--source NAME] [--limit N] [--processes N] [--shard I/N]
           [--worst N] [--data SET=FILE] [--dry-run]

--config   of a stage: its sources are compared; options such as --data.sources=... change it as in `tulu fit`
--against  YAML: `evaluations`, a list of sets with name, path or hub, and fields; and any other setting of
           `decontaminate`. Left out, each source's own `decontaminate` says it
--out      a new folder for report.txt, report.json and report.html; with an action also for the rows that are kept
           and manifest.json
--shard    compare only part I of N, on this machine or another one with the same cache (TULU_CACHE); then run once
           more without it for the report
--data     read an evaluation set of configs/data/tulu3_evaluations.yaml from a file, as in `tulu eval`
--dry-run  say what would be compared, with the first row and the first item, and stop
"""


def run(argv: Sequence[str]) -> None:
    """Compare, report, and write what is kept.

    Raises:
        InputError: options, config, sets or rows are bad, or the output folder is in use.
    """
    options, rest = _options(argv)
    require(options.worst >= 0, "--worst", options.worst, "Use 0 or more.")
    shard = _shard(options.shard)
    out = _new_folder(options.out)
    # All of it is written beside and moved in at the end: what a kill leaves is no output, and the same command goes on.
    beside = None if out is None else out.resolve().with_name(f".{out.resolve().name}.part")
    if beside is not None:
        remove(beside)
    for given in options.data:
        name, _, file = given.partition("=")
        if not (name and file):
            raise InputError("--data", f"is {given!r}", "Give NAME=FILE.")
        use_file(name, file)
    sources = _sources(rest, options)
    _check_files(sources)
    reports: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    waiting = 0
    for source in sources:
        scan = _open(source)
        check_used()
        if options.dry_run:
            print(_plan(scan), flush=True)
            continue
        findings = find(scan, processes_of(scan), shard)
        if findings is None:
            done = sum(scan.path(block).exists() for block in range(scan.blocks))
            print(f"{source.name}: {done} of {scan.blocks} blocks are compared; run the other shards too", flush=True)
            waiting += 1
            continue
        reports.append(report_of(scan, findings, options.worst))
        if beside is not None and scan.settings.action != "report":
            kept.append(_write_rows(beside, scan, findings))
    if options.dry_run or waiting:
        return
    print(as_text(reports), flush=True)
    if out is not None and beside is not None:
        _write_reports(beside, reports, kept)
        put_in_place(beside, out)
        print(f"written: {out}", file=sys.stderr, flush=True)


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise InputError("command line", message, "`tulu data decontaminate --help` shows the options.")


def _options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    options = _Options(add_help=False, allow_abbrev=False)
    options.add_argument("--against", type=Path)
    options.add_argument("--out", type=Path)
    options.add_argument("--action", choices=("report", "drop_rows", "drop_source"))
    options.add_argument("--mode", choices=("ngram", "exact", "embedding"))
    options.add_argument("--embedding-model", dest="model")
    options.add_argument("--turns", choices=("user", "all"))
    for name in ("--item-share", "--set-share", "--similarity"):
        options.add_argument(name, type=float)
    for name in ("--n", "--limit", "--processes"):
        options.add_argument(name, type=int)
    options.add_argument("--data", action="append", default=[])
    options.add_argument("--worst", type=int, default=5)
    options.add_argument("--source")
    options.add_argument("--shard")
    options.add_argument("--dry-run", action="store_true")
    return options.parse_known_args(argv)


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise InputError("--shard", f"is {text}", "Write it as 1/8, 2/8, up to 8/8.")
    return int(part) - 1, int(parts)


def _new_folder(out: Path | None) -> Path | None:
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(str(out), "is a file", "Give a new folder.")
    if out is not None and out.exists() and any(out.glob("[!.]*")):
        raise InputError(str(out), "the output folder is not empty", "Give a new one, or remove it.")
    return out


def _sources(rest: Sequence[str], options: argparse.Namespace) -> list[Source]:
    """The config's sources, each with what it is compared with."""
    data: Any = _DataOnly(["fit", *rest]).datamodule
    if not isinstance(data, StepData):
        what = f"is {type(data).__name__}"
        raise InputError("data.class_path", what, "Use one of SFTData, PreferenceData and PromptData.")
    names = [source.name for source in data.sources]
    if options.source is not None and options.source not in names:
        raise InputError("--source", f"there is no source {options.source!r}", nearest(options.source, names))
    shared = None if options.against is None else _read_settings(options.against)
    given = ("action", "mode", "model", "similarity", "turns", "item_share", "set_share", "n", "processes")
    own = {name: value for name in given if (value := getattr(options, name)) is not None}
    found = []
    for source in data.sources:
        if options.source not in (None, source.name):
            continue
        settings = shared or source.decontaminate
        if settings is None:
            remedy = "Give --against FILE with evaluations, or decontaminate in the config."
            raise InputError(f"source {source.name!r}", "there is nothing to compare it with", remedy)
        more = {} if options.limit is None else {"limit": min(options.limit, source.limit or options.limit)}
        found.append(dataclasses.replace(source, decontaminate=dataclasses.replace(settings, **own), **more))
    return found


def _read_settings(path: Path) -> Decontaminate:
    import yaml

    try:
        known = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        what = f"it cannot be read ({' '.join(str(error).split())})"
        raise InputError(str(path), what, "Give a YAML file with evaluations.") from error
    if not isinstance(known, dict) or not isinstance(known.get("evaluations"), list):
        raise InputError(
            str(path), "there is no list 'evaluations' in it", "Give one, of sets with name and path or hub."
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--settings", type=Decontaminate)
    try:
        with in_own_words():
            built: Any = parser.instantiate_classes(parser.parse_object({"settings": {"action": "report", **known}}))
    except InputError:
        raise
    except Exception as error:  # jsonargparse's, whose text is long
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(str(path), lines[-1] if lines else type(error).__name__, "Correct the file.") from error
    return built.settings


def _open(source: Source) -> Scan:
    settings = source.decontaminate
    assert settings is not None
    alone = dataclasses.replace(source, decontaminate=None)
    return open_scan(alone, open_source(alone), evaluation_index(settings), settings)


def _plan(scan: Scan) -> str:
    index, settings = scan.index, scan.settings
    sets = ", ".join(
        f"{name} ({count:,})"
        for name, count in zip(index.names, (index.first_items[1:] - index.first_items[:-1]), strict=True)
    )
    (row,) = scan.table.take([0])
    turns = turns_of(scan.source, scan.table.number(0), row, settings.turns)
    done = sum(scan.path(block).exists() for block in range(scan.blocks))
    return (
        f"{scan.source.name}: {len(scan.table):,} rows in {scan.blocks} blocks, {done} of them compared already\n"
        f"  against {sets}; {len(index.hashes):,} different {index.n}-grams; mode {settings.mode}, action {settings.action}\n"
        f"  first row:  {' / '.join(turns)[:300]!r}\n  first item: {' / '.join(index.item(0))[:300]!r}"
    )


# Output -------------------------------------------------------------------------------------------------------------


def _file(source: str) -> str:
    return f"{source.replace('/', '_')}.jsonl.gz"


def _check_files(sources: Sequence[Source]) -> None:
    """Refuse two sources whose rows would go into one file."""
    names: dict[str, str] = {}
    for source in sources:
        if (other := names.setdefault(_file(source.name), source.name)) != source.name:
            what = f"{other!r} and {source.name!r} would both be written as {_file(source.name)}"
            raise InputError("sources", what, "Rename one.")


def _write_rows(out: Path, scan: Scan, findings: Findings) -> dict[str, Any]:
    """The rows that stay, as JSON lines in the form in which they were read; what the manifest says of them."""
    bad = [verdict.name for verdict in verdicts(scan, findings) if verdict.contaminated]
    dropped = rows_to_drop(scan, findings)
    whole = scan.settings.action == "drop_source" and bool(bad)
    known = {
        "source": scan.source.name,
        "action": scan.settings.action,
        "contaminates": bad,
        "fingerprint": scan.table.fingerprint,
        "rows": len(scan.table),
        "settings": {**dataclasses.asdict(scan.settings), "index": scan.index.folder.name},
    }
    if whole:
        return {**known, "kept": 0, "file": None}
    numbers = [scan.table.number(int(index)) for index in dropped]
    path = out / _file(scan.source.name)
    out.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    leave, digest = set(dropped.tolist()), hashlib.sha256()
    with gzip.GzipFile(beside, "wb", mtime=0) as file:
        for start in range(0, len(scan.table), 1024):
            indices = [index for index in range(start, min(start + 1024, len(scan.table))) if index not in leave]
            for row in scan.table.take(indices):
                line = json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass") + b"\n"
                digest.update(line)
                file.write(line)
    beside.replace(path)
    kept = len(scan.table) - len(dropped)
    return {**known, "kept": kept, "file": path.name, "sha256": digest.hexdigest(), "left_out": numbers}


def _write_reports(out: Path, reports: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "report.txt", as_text(reports) + "\n")
    write_whole(out / "report.json", json.dumps({"sources": list(reports)}, indent=1, ensure_ascii=False))
    write_whole(out / "report.html", as_html(reports))
    if kept:
        write_whole(out / "manifest.json", json.dumps({"sources": list(kept)}, indent=1, ensure_ascii=False))
