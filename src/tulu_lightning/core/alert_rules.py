"""The rules of `core.alerts`: what each reads of a run's curves, and the sentence that it says."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, variance
from typing import NamedTuple

from tulu_lightning.core.settings import require

__all__ = ["READ", "RULES", "AlertLimits", "AllSeries", "Finding", "Series", "reward_without_score", "rule_of"]

READ = (
    "reward",
    "margin",
    "length",
    "entropy",
    "zero_signal_share",
    "stop_share",
    "mismatch_kl",
    "explained_variance",
)
"""Metrics that the rules read."""


@dataclass(frozen=True)
class AlertLimits:
    """When each rule speaks. Means are over `window` steps.

    Raises:
        InputError: a number out of its range.
    """

    window: int = 10
    length: float = 1.5
    """The mean length is so many times what it was in the first steps, or that part of it."""
    entropy: float = 0.2
    """The entropy is below this share of what it was in the first steps."""
    dead_groups: float = 0.8
    """A larger share of the groups had no signal: all their rewards were equal."""
    explained_variance: int = 20
    """The critic explained less than nothing in so many steps in a row."""
    truncation: float = 0.25
    """A larger share of the responses reached the token limit."""
    mismatch_kl: float = 0.02
    """Sampler and trainer differ by more nats a token."""
    errors: float = 3.0
    """A rise or a drift is one if it is at least so many standard errors large."""

    def __post_init__(self) -> None:
        for name, holds, remedy in (
            ("window", self.window >= 2, "Use at least 2 steps."),
            ("length", 1 < self.length < math.inf, "Use more than 1."),
            ("entropy", 0 < self.entropy < 1, "Use a share in (0, 1)."),
            ("dead_groups", 0 < self.dead_groups < 1, "Use a share in (0, 1)."),
            ("explained_variance", self.explained_variance >= 1, "Use at least 1 step."),
            ("truncation", 0 < self.truncation < 1, "Use a share in (0, 1)."),
            ("mismatch_kl", 0 < self.mismatch_kl < math.inf, "Use more than 0."),
            ("errors", 0 <= self.errors < math.inf, "Use 0 or more."),
        ):
            require(holds, f"alerts.{name}", getattr(self, name), remedy)


class _Window(NamedTuple):
    """Values of one metric over some steps."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def span(self) -> str:
        return f"steps {self.steps[0]} to {self.steps[-1]}"


def _distance(early: _Window, late: _Window) -> float:
    """late - early in standard errors (Welch); infinite where nothing varies and the means differ."""
    error = math.sqrt(variance(early.values) / len(early.values) + variance(late.values) / len(late.values))
    difference = late.mean - early.mean
    return difference / error if error else math.copysign(math.inf, difference) if difference else 0.0


class Series:
    """One metric: its first and its last values."""

    def __init__(self, longest: int, window: int) -> None:
        self.first: list[tuple[int, float]] = []
        self.recent: deque[tuple[int, float]] = deque(maxlen=longest)
        self.count, self.window = 0, window

    def add(self, step: int, value: float) -> None:
        if self.count < self.window:
            self.first.append((step, value))
        self.recent.append((step, value))
        self.count += 1

    def last(self, n: int) -> _Window | None:
        if len(self.recent) < n:
            return None
        steps, values = zip(*list(self.recent)[-n:], strict=True)
        return _Window(steps, values)

    def both(self) -> tuple[_Window, _Window] | None:
        """The first values and the last ones, once they do not overlap."""
        late = self.last(self.window)
        if late is None or self.count < 2 * self.window:
            return None
        steps, values = zip(*self.first, strict=True)
        return _Window(steps, values), late


class Finding(NamedTuple):
    """A rule that holds at the present step."""

    rule: str
    strength: float
    first: int
    text: str
    numbers: Mapping[str, float]
    limit: float


AllSeries = Mapping[str, Series]
"""By metric."""


def _last(series: AllSeries, name: str, n: int) -> _Window | None:
    return series[name].last(n) if name in series else None


def _both(series: AllSeries, name: str) -> tuple[_Window, _Window] | None:
    return series[name].both() if name in series else None


def rule_of(task: str) -> str:
    """The rule about a task's score, by a name of its own."""
    return f"reward without score:{task}"


def reward_without_score(
    series: AllSeries, limits: AlertLimits, task: str, start: tuple[int, float], now: tuple[int, float]
) -> Finding | None:
    """For a task with its (step, score) at the start and now."""
    name = "reward" if "reward" in series else "margin"
    (since, before), (step, score) = start, now
    windows = _both(series, name)
    if windows is None or score > before:
        return None
    early, late = windows
    distance = _distance(early, late)
    if distance < limits.errors:
        return None
    moved = f"fell from {before:.3f} to {score:.3f}" if score < before else f"stayed at {score:.3f}"
    text = (
        f"the training {name} rose from {early.mean:.3g} ({early.span}) to {late.mean:.3g} ({late.span}), "
        f"{distance:.1f} standard errors, and the score on {task} {moved} between steps {since} and {step} "
        f"(alert from {limits.errors:g} standard errors)"
    )
    numbers = {"early": early.mean, "late": late.mean, "errors": distance, "score_before": before, "score": score}
    return Finding(rule_of(task), distance, early.steps[0], text, numbers, limits.errors)


def _length_drift(series: AllSeries, limits: AlertLimits) -> Finding | None:
    windows = _both(series, "length")
    if windows is None or min(window.mean for window in windows) <= 0:
        return None
    early, late = windows
    ratio, distance = late.mean / early.mean, _distance(early, late)
    factor = max(ratio, 1 / ratio)
    if factor < limits.length or abs(distance) < limits.errors:
        return None
    text = (
        f"responses had {early.mean:.4g} tokens on average in {early.span} and {late.mean:.4g} in {late.span}, "
        f"{ratio:.2f} times as many (alert from {limits.length:g} times as many, or as few)"
    )
    numbers = {"early": early.mean, "late": late.mean, "ratio": ratio}
    return Finding("length drift", factor, late.steps[0], text, numbers, limits.length)


def _entropy_collapse(series: AllSeries, limits: AlertLimits) -> Finding | None:
    windows = _both(series, "entropy")
    if windows is None or windows[0].mean <= 0:
        return None
    early, late = windows
    share = late.mean / early.mean
    if share >= limits.entropy:
        return None
    text = (
        f"the entropy was {early.mean:.3g} nats a token in {early.span} and {late.mean:.3g} in {late.span}, "
        f"{share:.0%} of it (alert below {limits.entropy:.0%})"
    )
    numbers = {"early": early.mean, "late": late.mean, "share": share}
    return Finding("entropy collapse", -share, late.steps[0], text, numbers, limits.entropy)


def _dead_groups(series: AllSeries, limits: AlertLimits) -> Finding | None:
    window = _last(series, "zero_signal_share", limits.window)
    if window is None or window.mean <= limits.dead_groups:
        return None
    text = f"{window.mean:.0%} of the groups had no signal in {window.span} (alert above {limits.dead_groups:.0%})"
    return Finding("dead groups", window.mean, window.steps[0], text, {"share": window.mean}, limits.dead_groups)


def _negative_explained_variance(series: AllSeries, limits: AlertLimits) -> Finding | None:
    window = _last(series, "explained_variance", limits.explained_variance)
    if window is None or max(window.values) >= 0:
        return None
    n = len(window.values)
    text = (
        f"the critic's explained variance was below 0 in each of {window.span}, on average {window.mean:.3g} (alert "
        f"from {n} steps in a row)"
    )
    rule, numbers = "negative explained variance", {"mean": window.mean, "highest": max(window.values)}
    return Finding(rule, -window.mean, window.steps[0], text, numbers, float(n))


def _truncation(series: AllSeries, limits: AlertLimits) -> Finding | None:
    window = _last(series, "stop_share", limits.window)
    if window is None or 1 - window.mean <= limits.truncation:
        return None
    share = 1 - window.mean
    text = (
        f"{share:.0%} of the responses reached the token limit in {window.span} (alert above {limits.truncation:.0%})"
    )
    return Finding("truncation", share, window.steps[0], text, {"share": share}, limits.truncation)


def _mismatch(series: AllSeries, limits: AlertLimits) -> Finding | None:
    window = _last(series, "mismatch_kl", limits.window)
    if window is None or window.mean <= limits.mismatch_kl:
        return None
    text = (
        f"sampler and trainer differed by {window.mean:.3g} nats a token in {window.span} (alert above "
        f"{limits.mismatch_kl:g})"
    )
    return Finding("mismatch KL", window.mean, window.steps[0], text, {"kl": window.mean}, limits.mismatch_kl)


RULES: Mapping[str, Callable[[AllSeries, AlertLimits], Finding | None]] = {
    "length drift": _length_drift,
    "entropy collapse": _entropy_collapse,
    "dead groups": _dead_groups,
    "negative explained variance": _negative_explained_variance,
    "truncation": _truncation,
    "mismatch KL": _mismatch,
}
"""Those that need nothing but the metrics."""
