"""What looks wrong in the numbers of a run: seven rules, each with the steps, the numbers and the limit behind it.

An alert says what was measured, not why. The limits are conventions to look at a run by, not tests of a hypothesis.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tulu_lightning.core.alert_rules import READ, RULES, AlertLimits, Finding, Series, reward_without_score, rule_of
from tulu_lightning.core.promotion import HELD_OUT

__all__ = ["Alert", "AlertLimits", "Watcher", "alerts"]


class Alert(NamedTuple):
    """One thing that looks wrong, from the step at which it began to."""

    rule: str
    """`reward without score`, `length drift`, `entropy collapse`, `dead groups`, `negative explained variance`,
    `truncation`, `mismatch KL`."""
    first: int
    """The first step that the rule read when it began to hold."""
    last: int
    """The last step at which it held."""
    text: str
    """The evidence, in a sentence: steps, numbers and limit where it was strongest."""
    numbers: Mapping[str, float]
    """The same numbers by name."""
    limit: float


class Watcher:
    """Reads a run step by step.

    Args:
        limits: when each rule speaks.
    """

    def __init__(self, limits: AlertLimits | None = None) -> None:
        self.limits = limits or AlertLimits()
        self.alerts: list[Alert] = []
        """All so far, in the order in which they began."""
        self._series: dict[str, Series] = {}
        self._scores: dict[str, tuple[int, float]] = {}
        self._open: dict[str, tuple[int, float, int]] = {}  # rule -> place in `alerts`, strength, calls since it held

    def add(self, row: Mapping[str, Any]) -> list[Alert]:
        """Read the metrics of one step.

        Args:
            row: `step` and any others, as in `metrics.jsonl`. What is missing or not finite is not read.

        Returns:
            The alerts that begin with it.
        """
        step, limits = int(row["step"]), self.limits
        for name in READ:
            value = row.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                longest = max(limits.window, limits.explained_variance)
                self._series.setdefault(name, Series(longest, limits.window)).add(step, float(value))
        found = (rule(self._series, limits) for rule in RULES.values())
        return self._told(step, [finding for finding in found if finding is not None], RULES)

    def add_score(self, step: int, task: str, score: float) -> list[Alert]:
        """Read a strict held-out score; the first of a task is what later ones are held against. Returns as `add`.

        Where the held-out prompts are scored, they are what the reward is to raise: other tasks tell what it costs
        elsewhere, and that one of them does not rise says nothing against the reward.
        """
        if task not in self._scores:
            self._scores[task] = (step, score)
            return []
        if task != HELD_OUT and HELD_OUT in self._scores:
            return []
        finding = reward_without_score(self._series, self.limits, task, self._scores[task], (step, score))
        return self._told(step, [] if finding is None else [finding], [rule_of(task)])

    def _told(self, step: int, findings: Sequence[Finding], asked: Iterable[str]) -> list[Alert]:
        """Open, extend and close alerts: one that held within the last `window` calls goes on."""
        begun = []
        holding = {finding.rule: finding for finding in findings}
        for rule in asked:
            finding, kept = holding.get(rule), self._open.get(rule)
            if finding is None:
                if kept is not None:
                    place, strength, silent = kept
                    self._open[rule] = (place, strength, silent + 1)
                    if silent + 1 >= self.limits.window:
                        del self._open[rule]
                continue
            name = rule.partition(":")[0]
            if kept is None:
                self._open[rule] = (len(self.alerts), finding.strength, 0)
                begun.append(Alert(name, finding.first, step, finding.text, finding.numbers, finding.limit))
                self.alerts.append(begun[-1])
                continue
            place, strength, _ = kept
            alert = self.alerts[place]._replace(last=step)
            if finding.strength > strength:
                alert = alert._replace(text=finding.text, numbers=finding.numbers)
            self.alerts[place] = alert
            self._open[rule] = (place, max(strength, finding.strength), 0)
        return begun


def alerts(
    records: Iterable[Mapping[str, Any]], scores: Iterable[Mapping[str, Any]] = (), limits: AlertLimits | None = None
) -> list[Alert]:
    """What looked wrong in a whole run.

    Args:
        records: one mapping a step, as `metrics.jsonl` has them; they need not be in order.
        scores: strict held-out scores: `step` (0 for the start weights), `task` and `score`.
        limits: when each rule speaks.

    Returns:
        Each alert once, with the steps for which it held, in the order in which they began.
    """
    watcher = Watcher(limits)
    events = [(int(row["step"]), 0, row) for row in records] + [(int(row["step"]), 1, row) for row in scores]
    for step, kind, row in sorted(events, key=lambda event: event[:2]):
        if kind == 0:
            watcher.add(row)
        else:
            watcher.add_score(step, str(row["task"]), float(row["score"]))
    return watcher.alerts
