"""`tulu verify`: score responses offline, with a verifier of the package or one of your own."""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from tulu_lightning.data.jsonl import read_lines
from tulu_lightning.errors import InputError
from tulu_lightning.launch.own_verifiers import read_verifiers
from tulu_lightning.launch.whole_file import whole_file
from tulu_lightning.progress import Progress, duration
from tulu_lightning.rollout.pool import PoolLimits
from tulu_lightning.rollout.scoring import Job, Scorer
from tulu_lightning.types import Outcome, Verdict
from tulu_lightning.verifiers.registry import Verifiers

__all__ = ["Summary", "add_limits", "limits_of", "main", "verify"]

USAGE = """\
usage: tulu verify --verifier NAME --input FILE --output FILE [--limit N] [--overwrite]
                   [--workers N] [--seconds S] [--memory-mb M] [--verifiers FILE]
       tulu verify audit [--verifier NAME] [--workers N] [--seconds S] [--memory-mb M]

Scores responses with a verifier. FILE is JSON lines (.jsonl, also packed as .gz or .zst); each row has `response`, a
text, and `ground_truth`, a text or what the verifier reads as JSON (for ifeval an object with `instruction_id_list` and
`kwargs`, for ifeval_tulu one with `func_name` and its arguments). The rows come back in their order with `outcome`
(right, wrong, unparseable, timeout, error) and `score` (0 to 1) added and all else as it was.

  --limit N         score the first N rows only
  --overwrite       replace the output if it is there, and `outcome` and `score` of rows that have them
  --workers N       processes (default: one for each core)
  --seconds S       time of one response before its process is killed (default: 5)
  --memory-mb M     memory of a process (default: 1024)
  --verifiers FILE  YAML with verifiers of your own by name: class_path and init_args

audit  runs the hand-made cases that come with the package and tells each verifier's false negatives and false positives;
       status 1 if there are any. With --verifier, the cases of that one (for math_release, those of math).
"""
ADDED = ("outcome", "score")


class Summary(NamedTuple):
    """What came of a file."""

    rows: int
    outcomes: Counter[str]
    mean_score: float
    seconds: float


class Options(argparse.ArgumentParser):
    """Options of `tulu verify`; what is wrong with them is an InputError."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> Any:
        """Say it as everything else is said."""
        raise InputError("command line", message, "`tulu verify --help` shows the options.")


def add_limits(options: Options) -> None:
    """The options of the scoring pool."""
    options.add_argument("--workers", type=int)
    options.add_argument("--seconds", type=float, default=PoolLimits.seconds)
    options.add_argument("--memory-mb", type=int, default=PoolLimits.memory_mb)


def limits_of(chosen: argparse.Namespace) -> PoolLimits:
    """The pool's limits.

    Raises:
        InputError: one is out of range.
    """
    try:
        return PoolLimits(chosen.workers, chosen.seconds, chosen.memory_mb)
    except InputError as error:
        option = "--" + error.where.partition(".")[2].replace("_", "-")
        raise InputError(option, error.what, error.remedy) from None


def main(argv: Sequence[str]) -> int:
    """Run `tulu verify` or `tulu verify audit`.

    Raises:
        InputError: the options, a row or the verifier are bad, or the output is there already.
    """
    if not argv or any(option in ("-h", "--help") for option in argv):
        print(USAGE, end="")
        return 0
    if argv[0] == "audit":
        from tulu_lightning.launch import audit

        return audit.main(argv[1:])
    options = Options()
    for name in ("--verifier", "--input", "--output"):
        options.add_argument(name, required=True)
    options.add_argument("--limit", type=int)
    options.add_argument("--overwrite", action="store_true")
    options.add_argument("--verifiers")
    add_limits(options)
    chosen = options.parse_args(argv)
    verifiers = Verifiers(read_verifiers(Path(chosen.verifiers)) if chosen.verifiers else None)
    output = Path(chosen.output)
    summary = verify(
        chosen.verifier, Path(chosen.input), output, verifiers, limits_of(chosen), chosen.limit, chosen.overwrite
    )
    _print(summary, chosen.verifier, output)
    return 0


def verify(
    name: str,
    source: Path,
    output: Path,
    verifiers: Verifiers | None = None,
    limits: PoolLimits | None = None,
    limit: int | None = None,
    overwrite: bool = False,
) -> Summary:
    """Score a file. The output is there when all of it is.

    Args:
        name: of the verifier.
        source: rows with `response` and `ground_truth`.
        output: the rows with `outcome` and `score`; packed if its name ends with .gz or .zst.
        verifiers: those to choose from; the package's own if left out.
        limits: of the scoring pool.
        limit: rows to score, from the first on; all if left out.
        overwrite: replace an output, and fields of the rows, that are there.

    Raises:
        InputError: there is no such verifier, a row is bad, there are no rows, or the output exists.
    """
    verifiers = verifiers or Verifiers()
    _check_files(source, output, overwrite)
    if limit is not None and limit < 1:
        raise InputError("--limit", f"is {limit}", "Use at least 1.")
    rows, jobs = _read(source, name, verifiers, limit, overwrite)
    outcomes: Counter[str] = Counter()
    total, started = 0.0, time.perf_counter()
    with Scorer(verifiers, limits) as scorer, whole_file(output) as file, Progress("verify", len(rows)) as progress:
        for done, (row, verdict) in enumerate(zip(rows, _in_order(scorer, jobs, progress), strict=True), start=1):
            outcomes[verdict.outcome] += 1
            total += verdict.score
            file.write(_line({**row, "outcome": verdict.outcome, "score": verdict.score}))
            if done == len(rows):
                progress.update(done, f"right {outcomes['right'] / done:.1%}")
    return Summary(len(rows), outcomes, total / len(rows), time.perf_counter() - started)


def _in_order(scorer: Scorer, jobs: list[Job], progress: Progress) -> Iterator[Verdict]:
    """Verdicts in the order of the jobs, each as soon as those before it are there."""
    early: dict[int, Verdict] = {}
    due, shown = 0, 0.0
    for done, (place, verdict) in enumerate(scorer.each(jobs), start=1):
        early[place] = verdict
        if time.monotonic() - shown > 0.2 and done < len(jobs):
            progress.update(done)
            shown = time.monotonic()
        while due in early:
            yield early.pop(due)
            due += 1


def _check_files(source: Path, output: Path, overwrite: bool) -> None:
    if source.exists() and output.exists() and source.samefile(output):
        raise InputError(str(output), "is the input too", "Give another output.")
    if output.is_dir():
        raise InputError(str(output), "is a folder", "Give the name of a file.")
    if output.exists() and not overwrite:
        raise InputError(str(output), "is there already", "Give another output, or --overwrite.")
    if not output.parent.is_dir():
        raise InputError(str(output.parent), "there is no such folder", "Make it, or give another output.")


def _read(
    source: Path, name: str, verifiers: Verifiers, limit: int | None, overwrite: bool
) -> tuple[list[dict[str, Any]], list[Job]]:
    """All rows, checked, and the job of each."""
    verifiers[name]  # one that does not exist is told before a file is read
    rows: list[dict[str, Any]] = []
    jobs: list[Job] = []
    if not source.is_file():
        raise InputError(str(source), "there is no such file", "Correct --input.")
    for number, row in enumerate(read_lines(source, lambda number: f"{source}, row {number}"), start=1):
        if limit is not None and number > limit:
            break
        where = f"{source}, row {number}"
        _check_row(where, row, overwrite)
        target = _target(where, row["ground_truth"])
        complaint = verifiers.complaint(name, target)
        if complaint is not None:
            what = f"verifier {name!r} cannot use its ground_truth: {complaint}"
            raise InputError(where, what, "Correct the row, or choose the verifier that its ground truth is for.")
        rows.append(row)
        jobs.append(Job(name, row["response"], target))
    if not rows:
        raise InputError(str(source), "has no rows", "Give rows with `response` and `ground_truth`.")
    return rows, jobs


def _check_row(where: str, row: Any, overwrite: bool) -> None:
    if not isinstance(row, dict):
        raise InputError(where, f"it is a {type(row).__name__}, not an object", "Write one JSON object a line.")
    for field in ("response", "ground_truth"):
        if field not in row:
            has = ", ".join(map(repr, row)) or "nothing"
            raise InputError(where, f"has no {field!r} (it has {has})", "Give `response` and `ground_truth`.")
    if not isinstance(row["response"], str):
        what = f"its response is a {type(row['response']).__name__}, not a text"
        raise InputError(where, what, "Give one response a row, as a text.")
    there = [field for field in ADDED if field in row]
    if there and not overwrite:
        raise InputError(where, f"has {there[0]!r} already", "Rename that field, or give --overwrite.")


def _target(where: str, ground_truth: Any) -> str:
    """A text as it is; a number, list or object as JSON."""
    if isinstance(ground_truth, str):
        return ground_truth
    if ground_truth is None or isinstance(ground_truth, bool):
        what = f"its ground_truth is {json.dumps(ground_truth)}"
        raise InputError(where, what, "Give a text, a number, or the object that the verifier reads.")
    return json.dumps(ground_truth, ensure_ascii=False)


def _line(row: dict[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON may hold and UTF-8 may not
        text = json.dumps(row)
    return text + "\n"


def _print(summary: Summary, name: str, output: Path) -> None:
    rate = summary.rows / max(summary.seconds, 1e-9)
    print(f"{summary.rows:,} rows scored by {name!r} in {duration(summary.seconds)} ({rate:,.0f} rows/s): {output}")
    for outcome in get_args(Outcome):
        count = summary.outcomes[outcome]
        print(f"  {outcome:<11}  {count:>9,}  {count / summary.rows:6.1%}")
    print(f"  mean score   {summary.mean_score:.4f}", flush=True)
