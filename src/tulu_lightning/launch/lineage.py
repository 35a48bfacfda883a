"""`tulu lineage`: the chain from the base model to a checkpoint, with what each stage gained and what it cost."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tulu_lightning.errors import InputError
from tulu_lightning.progress import duration

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """The command line's."""
    found = argparse.ArgumentParser(prog="tulu lineage", description=__doc__)
    found.add_argument("folder", metavar="DIR", help="a checkpoint's folder, or that of a run of fit or recipe")
    found.add_argument("--json", action="store_true", help="print the records themselves")
    return found


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments.

    Returns:
        Exit status.

    Raises:
        InputError: the folder is no checkpoint and no run, or the chain is broken; what there is of it is printed first.
    """
    options = parser().parse_args(list(argv))
    from tulu_lightning.checkpoints.lineage import chain

    found = chain(Path(options.folder))
    if options.json:
        links = [{**link._asdict(), "folder": str(link.folder)} for link in found.links]
        print(json.dumps({"links": links, "broken": found.broken or None}, indent=1, ensure_ascii=False))
    else:
        print("\n".join(lines(found.links)))
    if found.broken:
        raise InputError(options.folder, found.broken, "Put it back, or the chain ends there.")
    return 0


def lines(links: Sequence[Any]) -> list[str]:
    """The chain for people, the base model first."""
    result = []
    for link in links:
        if link.record is None:
            result += [f"{link.name}  (weights {link.weights[:12]})", f"    {link.folder}"]
            continue
        record: Mapping[str, Any] = link.record
        decision = record["decision"]
        result += [
            f"└ {link.name}: {record['stage']}, {_cost(record['cost'], record['steps_planned'])}",
            f"    {link.folder}  (weights {link.weights[:12]})",
            *(f"    {line}" for line in _scores(record)),
            f"    {'promoted' if decision['promote'] else 'not promoted'} {record['time']}: {decision['reason']}",
        ]
    records = [link.record for link in links if link.record is not None]
    if len(records) > 1:
        total = {name: sum(record["cost"][name] for record in records) for name in records[0]["cost"]}
        result.append(f"in all: {_cost(total)}")
    return result


def _cost(cost: Mapping[str, float], planned: int | None = None) -> str:
    of = f" of {planned}" if planned is not None and planned != cost["steps"] else ""
    tokens = f"{_count(cost['tokens'])} tokens ({_count(cost['trained_tokens'])} trained)"
    return f"{cost['steps']:g} steps{of}, {duration(cost['seconds'])}, {tokens}"


def _count(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def _scores(record: Mapping[str, Any]) -> list[str]:
    """A line a task: from, to, and the difference with its interval where the decision had one."""
    before, after = record["scores"]["before"], record["scores"]["after"]
    verdicts = {verdict["task"]: verdict for verdict in record["decision"]["verdicts"]}
    result = []
    for task, score in after.items():
        start = f"{100 * before[task]['score']:.1f} → " if task in before else ""
        line = f"{task} {start}{100 * score['score']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
        verdict = verdicts.get(task)
        if verdict is not None and verdict["difference"] is not None:
            ends = f"[{100 * verdict['low']:+.1f}, {100 * verdict['high']:+.1f}]"
            line += f", {verdict['role']} {100 * verdict['difference']:+.1f} {ends}"
        result.append(f"{line}, n = {score['n']}")
    return result
