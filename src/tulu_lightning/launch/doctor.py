"""`tulu doctor`: what is installed, what is off and why, and whether this machine runs the demo."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tulu_lightning import __version__
from tulu_lightning.errors import InputError
from tulu_lightning.launch import devices, machine, packages, smoke
from tulu_lightning.launch.findings import Finding, lines
from tulu_lightning.progress import Progress

__all__ = ["examine", "main"]

USAGE = """\
usage: tulu doctor [--json] [--no-smoke] [--runs FOLDER]

Looks at this machine and at what is installed, and trains a tiny model for a few seconds. Status 0: it runs the demo
(`make demo`). Status 1: it does not, and the reasons stand at the end.

  --json         one JSON object instead of text
  --no-smoke     leave the training step out
  --runs FOLDER  where runs are kept, for its disk (default: runs)

ok     is as it should be
off    something optional is not there, and why
warn   it runs, and this will be noticed
fails  the demo does not run without it
"""


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise InputError("command line", message, "`tulu doctor --help` shows the options.")


def examine(runs: Path = Path("runs"), with_smoke: bool = True) -> Iterator[tuple[str, list[Finding]]]:
    """Findings, group by group as they come: (what was looked at, findings).

    Args:
        runs: the folder in which runs are kept.
        with_smoke: whether to train the tiny model.
    """
    yield "packages", list(packages.look())
    yield "machine", list(machine.look(runs))
    on_torch = list(devices.look())
    yield "devices", on_torch
    if not with_smoke:
        yield "smoke step", [Finding(smoke.PART, "SFT and GRPO", "off", "because of --no-smoke")]
    elif any(finding.state == "fails" for finding in on_torch):
        yield "smoke step", [Finding(smoke.PART, "SFT and GRPO", "off", "because torch or Lightning does not import")]
    else:
        yield "smoke step", list(smoke.look())


def main(argv: Sequence[str]) -> int:
    """Run `tulu doctor`.

    Returns:
        0 if this machine runs the demo, else 1.

    Raises:
        InputError: an unknown option.
    """
    options = _Options(add_help=False, allow_abbrev=False)
    options.add_argument("--json", action="store_true")
    options.add_argument("--no-smoke", action="store_true")
    options.add_argument("--runs", type=Path, default=Path("runs"))
    options.add_argument("-h", "--help", action="store_true")
    chosen = options.parse_args(list(argv))
    if chosen.help:
        print(USAGE, end="")
        return 0
    findings: list[Finding] = []
    with Progress("doctor", total=4) as progress:
        for done, (what, some) in enumerate(examine(chosen.runs, not chosen.no_smoke), start=1):
            findings += some
            progress.update(done, what)
    reasons = [finding for finding in findings if finding.state == "fails"]
    print(_json(findings, reasons) if chosen.json else _text(findings, reasons))
    return 1 if reasons else 0


def _json(findings: Sequence[Finding], reasons: Sequence[Finding]) -> str:
    every = [finding._asdict() for finding in findings]
    whole = {"version": __version__, "can_run_demo": not reasons, "reasons": [_reason(r) for r in reasons]}
    return json.dumps({**whole, "findings": every}, indent=1, ensure_ascii=False)


def _text(findings: Sequence[Finding], reasons: Sequence[Finding]) -> str:
    text = [f"tulu_lightning {__version__}, Python {sys.version.split()[0]}", "", *lines(findings), ""]
    if not reasons:
        return "\n".join([*text, "This machine can run the demo (`make demo`)."])
    return "\n".join([*text, "This machine cannot run the demo:", *(f"  - {_reason(reason)}" for reason in reasons)])


def _reason(finding: Finding) -> str:
    return f"{finding.name}: {finding.text}. {finding.remedy}".strip()
