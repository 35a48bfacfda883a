"""When a checkpoint takes the place of the one before it: a paired interval decides, not the point estimate."""

from collections.abc import Sequence
from dataclasses import dataclass

from tulu_lightning.core.stats import paired_bootstrap
from tulu_lightning.errors import InputError

__all__ = ["Decision", "PromotionRule"]


@dataclass(frozen=True)
class Decision:
    """The answer, and a sentence with the numbers behind it."""

    promote: bool
    reason: str
    difference: float | None
    """Mean of after - before; None where nothing could be compared."""
    low: float | None
    high: float | None


@dataclass(frozen=True)
class PromotionRule:
    """Promote when the paired interval of the difference lies above a bound.

    Gain rule (`max_loss=None`): the lower end must be above `min_gain`: the checkpoint is better, beyond chance.
    Guard rule (`max_loss` set): the lower end must be above `-max_loss`: it has not become worse by more than that,
    for metrics that a stage does not aim at.
    """

    min_gain: float = 0.0
    max_loss: float | None = None
    confidence: float = 0.95
    min_items: int = 100
    """Fewer paired items than this promote nothing: the bootstrap of a handful is too narrow."""

    def __post_init__(self) -> None:
        if self.max_loss is not None and self.min_gain != 0.0:
            what = f"min_gain is {self.min_gain} and max_loss is {self.max_loss}, but only one of them can decide"
            raise InputError("promotion", what, "Leave out one of the two.")
        if self.max_loss is not None and self.max_loss < 0:
            raise InputError(
                "promotion.max_loss", f"it is {self.max_loss}", "Give how far the score may fall, above 0."
            )
        if not 0 < self.confidence < 1:
            raise InputError("promotion.confidence", f"it is {self.confidence}", "Give a number in (0, 1), e.g. 0.95.")
        if self.min_items < 1:
            raise InputError("promotion.min_items", f"it is {self.min_items}", "Give at least 1.")

    def decide(self, before: Sequence[float], after: Sequence[float]) -> Decision:
        """Decide from per-item scores of the same items in the same order.

        An empty `before` means that there is no earlier checkpoint (the first stage of a recipe): there is nothing to
        be better than, so it is promoted, provided that it was scored on enough items. An evaluation that failed must
        not be passed in as an empty one.

        Raises:
            InputError: both are there, but of different lengths, or a score is not finite.
        """
        if len(after) < self.min_items:
            return Decision(
                False, f"only {len(after)} items were scored; the rule asks for {self.min_items}", *[None] * 3
            )
        if not before:
            mean = sum(after) / len(after)
            reason = f"no earlier checkpoint to compare with; the score is {mean:.4f} on {len(after)} items"
            return Decision(True, reason, *[None] * 3)
        try:
            difference, low, high = paired_bootstrap(before, after, self.confidence)
        except ValueError as error:
            raise InputError("promotion", str(error), "Score both checkpoints on the same items.") from error
        return Decision(low > self._bound, self._reason(difference, low, high, len(after)), difference, low, high)

    @property
    def _bound(self) -> float:
        return self.min_gain if self.max_loss is None else -self.max_loss

    def _reason(self, difference: float, low: float, high: float, n: int) -> str:
        verb = "rose" if difference > 0 else "fell" if difference < 0 else "moved"
        position = "above" if low > self._bound else "not above"
        asked = f"min_gain = {self.min_gain}" if self.max_loss is None else f"-max_loss = {-self.max_loss}"
        return (
            f"the score {verb} by {abs(difference):.4f} on {n} paired items; the lower end of its {self.confidence:.0%} "
            f"interval [{low:.4f}, {high:.4f}] is {position} {asked}"
        )
