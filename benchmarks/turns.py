"""Two or more sides of a benchmark in turn: their settings, the sweep over these, and ratios run by run."""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from measure import Shape, matmul_peak

__all__ = ["Setting", "in_turns", "median", "memory_of", "ratios", "say", "spread", "sweep"]


@dataclass(frozen=True)
class Setting:
    """One way to run a side."""

    name: str
    settings: dict[str, Any]
    same: bool = True
    """It computes the same thing: no attention across rows, fp32 weights."""
    same_steps: bool = True
    """Its steps hold the same rows as ours."""


Run = Callable[[str, Setting, int], dict[str, Any]]
"""Trains with a side's setting for so many steps after the first, and says what was measured (`rate` and the like)."""


def sweep(
    run: Run,
    side: str,
    settings: Sequence[Setting],
    steps: int,
    rate: str,
    kept: Sequence[str],
    run_all: Callable[[str, Sequence[Setting], int], Sequence[dict[str, Any]]] | None = None,
) -> tuple[Setting, list[dict[str, Any]]]:
    """Each setting for a step or two.

    Args:
        run: a side once.
        side: whose settings.
        settings: what to try.
        steps: timed steps of each.
        rate: which number of a run decides; the highest is the best.
        kept: numbers of a run for the table.
        run_all: runs them all in one process, where that is what starting takes the time of.

    Returns:
        The fastest that computes the same thing, and the table.
    """
    rows, best = [], (0.0, settings[0])
    results = run_all(side, settings, steps) if run_all else (run(side, setting, steps) for setting in settings)
    for setting, result in zip(settings, results, strict=True):
        if "failed" in result:
            rows.append({"side": side, **asdict(setting), "failed": result["failed"]})
            continue
        if setting.same and result[rate] > best[0]:
            best = result[rate], setting
        numbers = {key: round(result[key], 1 if result[key] > 10 else 3) for key in kept}
        rows.append({"side": side, **asdict(setting), **numbers, "peak_bytes": memory_of(result)})
    return best[1], rows


def in_turns(
    run: Run, sides: Mapping[str, Setting], rounds: int, steps: int, dtype: str, shape: Shape
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Every side once a round, in this order and the next time the other way round.

    Returns:
        The runs of each side, and the best matrix product found between them (`measure.matmul_peak`).
    """
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    peaks = []
    for number in range(rounds):
        order = list(sides.items())
        for side, setting in order if number % 2 == 0 else order[::-1]:
            peaks.append(matmul_peak(getattr(torch, dtype), shape))
            results[side].append(run(side, setting, steps))
    return results, max(peaks, key=lambda peak: peak["flops"])


def memory_of(result: Mapping[str, Any]) -> int:
    """Peak memory of a run: on the device where there is one, else the process' own."""
    return result.get("device_peak_bytes") or result["peak_bytes"]


def median(results: Sequence[Mapping[str, Any]], key: str) -> float:
    """The median of one number over runs."""
    return statistics.median(result[key] for result in results)


def ratios(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], key: str = "rate") -> dict[str, Any]:
    """Ratios of one number, run by run."""
    return spread([a[key] / b[key] for a, b in zip(ours, theirs, strict=True)])


def spread(found: list[float]) -> dict[str, Any]:
    """Ratios pair by pair, ours over the other's."""
    whole = {"median": statistics.median(found), "min": min(found), "max": max(found)}
    return {key: round(value, 3) for key, value in whole.items()} | {"pairs": [round(ratio, 3) for ratio in found]}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
