"""`tulu verify audit`: the verifiers against hand-made cases, each with the reason for its outcome."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tulu_lightning.verifiers
from tulu_lightning.data.jsonl import read_lines
from tulu_lightning.errors import InputError
from tulu_lightning.launch.verify import Options, add_limits, limits_of
from tulu_lightning.progress import Progress
from tulu_lightning.rollout.pool import PoolLimits
from tulu_lightning.rollout.scoring import Job, Scorer
from tulu_lightning.types import Verdict
from tulu_lightning.verifiers.judge import JudgeReading
from tulu_lightning.verifiers.registry import Verifiers

__all__ = ["GOLDEN", "Case", "Result", "audit", "cases_for", "main", "read_cases"]

GOLDEN = Path(tulu_lightning.verifiers.__path__[0]) / "golden"
COLUMNS = ("verifier", "cases", "adversarial", "false negatives", "false positives", "other misses")


class Case(NamedTuple):
    """One case: what the verifier must say, and why."""

    verifier: str
    response: str
    target: str
    outcomes: tuple[str, ...]
    """Those that will do; more than one where a time limit may come first."""
    reason: str
    adversarial: bool
    place: str
    """File and line."""


class Result(NamedTuple):
    """A case and what the verifier said."""

    case: Case
    verdict: Verdict

    @property
    def miss(self) -> str:
        """`false negative` (right, not said so), `false positive` (said right, is not), `other miss`, or empty."""
        said, wanted = self.verdict.outcome, self.case.outcomes
        if said in wanted:
            return ""
        if "right" in wanted:
            return "false negative"
        return "false positive" if said == "right" else "other miss"


def read_cases(folder: Path = GOLDEN) -> list[Case]:
    """The cases of all files of a folder.

    A line has `verifier`, `response`, `target`, `outcome` (several joined by `|`), `reason` and `kind`. In place of
    `response` it may have `response_parts`, a list of texts and how often each stands there.

    Raises:
        InputError: a line is no case.
    """
    return [
        _case(f"{path.name}, line {number}", line)
        for path in sorted(folder.glob("*.jsonl"))
        for number, line in enumerate(read_lines(path, lambda number, path=path: f"{path}, row {number}"), start=1)
    ]


def _case(place: str, line: dict[str, Any]) -> Case:
    try:
        response = line.get("response")
        if response is None:
            response = "".join(text * times for text, times in line["response_parts"])
        target = line["target"] if isinstance(line["target"], str) else json.dumps(line["target"])
        outcomes = tuple(line["outcome"].split("|"))
        return Case(line["verifier"], response, target, outcomes, line["reason"], line["kind"] == "adversarial", place)
    except (KeyError, TypeError, ValueError) as error:
        what = f"is no case ({type(error).__name__}: {error})"
        raise InputError(place, what, "Give verifier, response, target, outcome, reason and kind.") from None


def cases_for(name: str | None, cases: Sequence[Case]) -> list[Case]:
    """The cases to run: all, those of a verifier, or those of its family, asked of that verifier instead.

    The family of `math_release` is `math`: the longest name with cases that it continues.

    Raises:
        InputError: the verifier has no cases.
    """
    if name is None:
        return list(cases)
    own = [case for case in cases if case.verifier == name]
    if own:
        return own
    families = [case.verifier for case in cases if name.startswith(case.verifier + "_")]
    if not families:
        known = ", ".join(sorted({case.verifier for case in cases}))
        raise InputError("--verifier", f"there are no cases for {name!r}", f"There are some for: {known}.")
    family = max(families, key=len)
    return [case._replace(verifier=name) for case in cases if case.verifier == family]


def audit(cases: Sequence[Case], limits: PoolLimits | None = None) -> list[Result]:
    """What the verifiers say of the cases, through the scoring pool as in a run.

    Raises:
        InputError: a case's verifier does not exist or cannot use its target.
    """
    verifiers = Verifiers({"judge": JudgeReading()})
    for case in cases:
        complaint = verifiers.complaint(case.verifier, case.target)
        if complaint is not None:
            raise InputError(
                case.place, f"verifier {case.verifier!r} cannot use its target: {complaint}", "Correct it."
            )
    jobs = [Job(case.verifier, case.response, case.target) for case in cases]
    with Scorer(verifiers, limits) as scorer, Progress("audit", len(jobs)) as progress:
        verdicts = scorer.verdicts(jobs, lambda done, _: progress.update(done))
    return [Result(case, verdict) for case, verdict in zip(cases, verdicts, strict=True)]


def main(argv: Sequence[str]) -> int:
    """Run `tulu verify audit`.

    Returns:
        1 if a verifier said anything else than a case wants, else 0.

    Raises:
        InputError: there is no such verifier, or it has no cases.
    """
    options = Options()
    options.add_argument("--verifier")
    add_limits(options)
    chosen = options.parse_args(argv)
    if chosen.verifier not in (None, "judge"):
        Verifiers()[chosen.verifier]
    results = audit(cases_for(chosen.verifier, read_cases()), limits_of(chosen))
    print(_table(results))
    misses = [result for result in results if result.miss]
    for result in misses:
        case = result.case
        print(
            f"\n{result.miss}: {case.verifier}, {case.place}: said {result.verdict.outcome}, not {'|'.join(case.outcomes)}"
        )
        print(f"  reason    {case.reason}\n  response  {_short(case.response)}\n  target    {_short(case.target)}")
    return 1 if misses else 0


def _table(results: Sequence[Result]) -> str:
    rows: list[tuple[str, ...]] = [COLUMNS]
    names = sorted({result.case.verifier for result in results})
    for name in (*names, "all"):
        of = [result for result in results if name in ("all", result.case.verifier)]
        misses = [result.miss for result in of]
        kinds = ("false negative", "false positive", "other miss")
        counts = (len(of), sum(result.case.adversarial for result in of), *(misses.count(kind) for kind in kinds))
        rows.append((name, *(f"{count:,}" for count in counts)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _short(text: str) -> str:
    shown = repr(text[:200])
    return f"{shown} ... ({len(text):,} characters)" if len(text) > 200 else shown
