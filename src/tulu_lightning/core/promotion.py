"""When a checkpoint takes the place of the one before it: paired intervals decide, not point estimates.

A run's level is 1 - `confidence`. Three things could make a false promotion likelier than that, and each has its answer:

- Several looks (an evaluation every n steps, each of which may promote) share the level: `core.gain.share_of_level`.
- Several tasks of which any will do (`gains_needed: any`) share a look's level evenly (Bonferroni).
- Several tasks that must all pass, gains and guards alike, need no share: if one of them has no true gain, only its own
  test can let the checkpoint through falsely (the intersection-union test; Berger 1982).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tulu_lightning.core.gain import FINEST, Gain, Look, Paired, Spending, gain, share_of_level
from tulu_lightning.core.settings import require
from tulu_lightning.errors import InputError, nearest

__all__ = ["HELD_OUT", "Decision", "PromotionRule", "TaskVerdict"]

HELD_OUT = "held-out"
"""What the held-out prompts are called among the tasks."""
WHERE = "promotion"


@dataclass(frozen=True)
class TaskVerdict:
    """What one task says."""

    task: str
    role: Literal["gain", "guard"]
    bound: float
    """The lower end must be above it: the margin of a gain, or minus what a guard may fall by."""
    n: int
    difference: float | None
    """Mean of after - before; None where nothing could be compared."""
    low: float | None
    high: float | None
    confidence: float | None
    """Of the interval."""
    passed: bool
    reason: str


@dataclass(frozen=True)
class Decision:
    """The answer, and a sentence with the numbers behind it."""

    promote: bool
    reason: str
    difference: float | None
    """That of the first task that has to gain, or of the only one; None where nothing could be compared."""
    low: float | None
    high: float | None
    verdicts: tuple[TaskVerdict, ...] = ()
    look: int = 1
    looks: int = 1
    level: float | None = None
    """What this look used of the run's level; None where nothing was tested."""


@dataclass(frozen=True)
class PromotionRule:
    """Promote when the paired intervals of the differences lie above their bounds.

    Without `gains` and `guards` one task decides, the held-out prompts if there are any:

    - gain (`max_loss=None`): the lower end must be above `min_gain`: the checkpoint is better, beyond chance;
    - guard (`max_loss` set): the lower end must be above `-max_loss`: it has not become worse by more than that.

    With them, tasks are named: what has to gain and by how much, and what must not fall and by how much.

    Raises:
        InputError: settings that clash or can never pass.
    """

    min_gain: float = 0.0
    max_loss: float | None = None
    confidence: float = 0.95
    """Of the two-sided intervals, over all looks of a run: at most (1 - confidence) / 2 of the runs without a true gain
    are promoted."""
    min_items: int = 100
    """Fewer paired items than this promote nothing: the bootstrap of a handful is too narrow."""
    gains: dict[str, float] = field(default_factory=dict)
    """Task -> margin that its gain must exceed beyond chance, e.g. `{gsm8k: 0.0, math: 0.01}`."""
    guards: dict[str, float] = field(default_factory=dict)
    """Task -> how far its score may fall, e.g. `{ifeval: 0.02}`."""
    gains_needed: Literal["all", "any"] = "all"
    """Whether every task of `gains` has to gain, or any one of them."""
    spending: Spending = "even"
    """How looks share the level; see `core.gain.share_of_level`."""
    looks: int | None = None
    """Planned looks; null counts those of the run. Give more where several runs will be tried for one promotion."""

    def __post_init__(self) -> None:
        if self.max_loss is not None and self.min_gain != 0.0:
            what = f"min_gain is {self.min_gain} and max_loss is {self.max_loss}, but only one of them can decide"
            raise InputError(WHERE, what, "Leave out one of the two.")
        if self.gains or self.guards:
            clash = "min_gain" if self.min_gain != 0.0 else "max_loss" if self.max_loss is not None else ""
            require(not clash, f"{WHERE}.{clash}", "given beside gains or guards", "Name its task under one of them.")
        held_to = "Scores lie in [0, 1]: 0.05 is 5 points. Give 0 or more, below 1."
        if self.max_loss is not None:
            require(0 <= self.max_loss < 1, f"{WHERE}.max_loss", self.max_loss, held_to)
        require(-1 < self.min_gain < 1, f"{WHERE}.min_gain", self.min_gain, "Scores lie in [0, 1]: 0.05 is 5 points.")
        for name in ("gains", "guards"):
            for task, bound in getattr(self, name).items():
                other = " How far a task may fall is said under guards." if name == "gains" else ""
                require(0 <= bound < 1, f"{WHERE}.{name}.{task}", bound, held_to + other)
        for task in self.gains:
            remedy = "A gain beyond chance is not a fall: leave it out of guards."
            require(task not in self.guards, f"{WHERE}.guards.{task}", "a task that has to gain as well", remedy)
        require(0 < self.confidence < 1, f"{WHERE}.confidence", self.confidence, "Give a number in (0, 1), e.g. 0.95.")
        require(self.min_items >= 1, f"{WHERE}.min_items", self.min_items, "Give at least 1.")
        require(self.looks is None or self.looks >= 1, f"{WHERE}.looks", self.looks, "Give at least 1, or null.")
        for name, choices in (("gains_needed", ("all", "any")), ("spending", ("even", "late"))):
            value = getattr(self, name)
            require(value in choices, f"{WHERE}.{name}", repr(value), nearest(str(value), choices))
        several = "With fewer than two tasks under gains it changes nothing: leave it out."
        require(self.gains_needed == "all" or len(self.gains) > 1, f"{WHERE}.gains_needed", "any", several)

    # Names ------------------------------------------------------------------------------------------------------

    def check(self, evaluated: Sequence[str]) -> None:
        """Refuse a rule that names a task which is not evaluated, or names none where there are several.

        Args:
            evaluated: names of the tasks that will be scored.

        Raises:
            InputError: as said; offers the nearest.
        """
        for name in ("gains", "guards"):
            for task in getattr(self, name):
                if task not in evaluated:
                    what = f"the rule names {task!r}, which Evaluate does not score"
                    raise InputError(f"{WHERE}.{name}", what, nearest(task, evaluated))
        if not (self.gains or self.guards or HELD_OUT in evaluated or len(evaluated) == 1):
            what = f"the rule names no task, and {len(evaluated)} are evaluated ({', '.join(sorted(evaluated))})"
            raise InputError(
                WHERE, what, "Say under gains which of them have to gain, under guards which must not fall."
            )

    def roles(self, evaluated: Sequence[str]) -> list[tuple[str, Literal["gain", "guard"], float]]:
        """(task, role, bound) of every task that has a say, gains first."""
        if self.gains or self.guards:
            gains = [(task, "gain", margin) for task, margin in self.gains.items()]
            return [*gains, *((task, "guard", -loss) for task, loss in self.guards.items())]  # type: ignore[list-item]
        task = HELD_OUT if HELD_OUT in evaluated else next(iter(evaluated))
        return [(task, "gain", self.min_gain) if self.max_loss is None else (task, "guard", -self.max_loss)]

    # Deciding ---------------------------------------------------------------------------------------------------

    def decide(self, before: Sequence[float], after: Sequence[float]) -> Decision:
        """Decide by one task, at one look, from per-item scores of the same items in the same order.

        An empty `before` means that there is no earlier checkpoint (the first stage of a recipe): there is nothing to
        be better than, so it is promoted, provided that it was scored on enough items. An evaluation that failed must
        not be passed in as an empty one.

        Raises:
            InputError: both are there, but of different lengths, or a score is not finite.
        """
        if before or len(after) < self.min_items:
            return self.judge({HELD_OUT: Paired(before, after)})
        mean = sum(after) / len(after)
        reason = f"no earlier checkpoint to compare with; the score is {mean:.4f} on {len(after)} items"
        return Decision(True, reason, None, None, None)

    def judge(self, scores: Mapping[str, Paired], look: Look | None = None) -> Decision:
        """Decide from the per-item scores of all tasks that have a say.

        Args:
            scores: by task. A gain is held against the checkpoint that would be replaced, a guard against the stage's
                start; which scores those are is the caller's choice.
            look: which of the run's looks this is.

        Raises:
            InputError: a task is missing, its scores do not pair, or one is not finite.
        """
        self.check(list(scores))
        look = look or Look()
        roles = self.roles(list(scores))
        level = share_of_level(1 - self.confidence, look, self.spending)
        choices = sum(role == "gain" for _, role, _ in roles) if self.gains_needed == "any" else 1
        verdicts = tuple(
            self._verdict(task, role, bound, scores[task], level / (choices if role == "gain" else 1))
            for task, role, bound in roles
        )
        passed = [v.passed for v in verdicts if v.role == "gain"]
        gained = any(passed) if self.gains_needed == "any" and passed else all(passed)
        promote = gained and all(v.passed for v in verdicts if v.role == "guard")
        first = verdicts[0]
        which = f"look {look.number} of {look.planned}: " if look.planned > 1 else ""
        reason = which + "; ".join(v.reason for v in verdicts)
        return Decision(
            promote, reason, first.difference, first.low, first.high, verdicts, look.number, look.planned, level
        )

    def _verdict(
        self, task: str, role: Literal["gain", "guard"], bound: float, pairs: Paired, level: float
    ) -> TaskVerdict:
        n = len(pairs.after)
        name = f"{task}: " if self.gains or self.guards else ""
        if n < self.min_items:
            reason = f"{name}only {n} items were scored; the rule asks for {self.min_items}"
            return TaskVerdict(task, role, bound, n, None, None, None, None, False, reason)
        tested = level >= FINEST
        confidence = 1 - (level if tested else 1 - self.confidence)
        try:
            found = gain(pairs, confidence)
        except ValueError as error:
            raise InputError(WHERE, f"{name}{error}", "Score both checkpoints on the same items.") from error
        passed = tested and found.low > bound
        reason = name + self._reason(role, bound, found, n, confidence)
        if not tested:
            reason += f"; but this look may use {level:.1g} of the level, which is less than can be told ({FINEST:g})"
        return TaskVerdict(task, role, bound, n, *found, confidence, passed, reason)

    @staticmethod
    def _reason(role: str, bound: float, found: Gain, n: int, confidence: float) -> str:
        verb = "rose" if found.difference > 0 else "fell" if found.difference < 0 else "moved"
        position = "above" if found.low > bound else "not above"
        asked = f"min_gain = {bound}" if role == "gain" else f"-max_loss = {bound}"
        width = f"{math.floor(confidence * 1e4) / 100:g}%"
        return (
            f"the score {verb} by {abs(found.difference):.4f} on {n} paired items; the lower end of its {width} "
            f"interval [{found.low:.4f}, {found.high:.4f}] is {position} {asked}"
        )
