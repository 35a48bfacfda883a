"""From ratings of several responses to one pair: pure functions.

Source: Tülu 3, section 5.2.1, and its release's `scripts/synth_pref`: the mean over the aspects decides; the highest is
chosen, a random lower one rejected.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["NOT_APPLICABLE", "NoPair", "Rating", "mean_rating", "pick"]

NOT_APPLICABLE = "N/A"
Rating = float | str | None
"""A number, "N/A", or None where the judge's answer had no rating."""


class NoPair(NamedTuple):
    """Why there is no pair."""

    reason: str


def mean_rating(ratings: Sequence[Rating]) -> float | None:
    """Mean of a response's ratings over aspects; "N/A" does not count.

    None where one of them could not be read, or none counts: such a response has no place in an order.

    Example: `mean_rating([4, 5, "N/A", 3])` is 4.0.
    """
    if any(rating is None for rating in ratings):
        return None
    numbers = [float(rating) for rating in ratings if not isinstance(rating, str) and rating is not None]
    return sum(numbers) / len(numbers) if numbers else None


def pick(
    means: Sequence[float | None],
    draw: random.Random,
    *,
    literal: bool = False,
    least_chosen: float | None = None,
    allowed: Sequence[tuple[int, int]] | None = None,
) -> tuple[int, int] | NoPair:
    """Choose (chosen, rejected) among responses.

    Args:
        means: mean rating of each response; None where there is none.
        draw: of the prompt; decides among equally good ones and which lower one is rejected.
        literal: as the release does it: rejected is any other response, also one that is as good or has no rating.
        least_chosen: a chosen response below it makes no pair.
        allowed: pairs of places, in either order, that may become a pair; all if left out.

    Returns:
        Places in `means`; or why there is no pair: too few responses could be ordered, all are alike, none is good
        enough.
    """
    rated = [place for place, mean in enumerate(means) if mean is not None]
    if len(rated) < (1 if literal else 2) or len(means) < 2:
        return NoPair("too few rated responses")
    value = {place: mean for place, mean in enumerate(means) if mean is not None}

    def others(chosen: int) -> list[int]:
        fits = [p for p in range(len(means)) if p != chosen and _allowed(chosen, p, allowed)]
        return fits if literal else [p for p in fits if p in value and value[p] < value[chosen]]

    best = max(value.values())
    if least_chosen is not None and best < least_chosen:
        return NoPair("no response is good enough")
    if min(value.values()) == best and not literal:
        return NoPair("all responses are alike")
    # Where pairs are restricted, the best response that has a partner is chosen.
    levels = sorted(set(value.values()), reverse=True) if allowed is not None else [best]
    for level in levels:
        if least_chosen is not None and level < least_chosen:
            break
        candidates = [place for place in rated if value[place] == level and others(place)]
        if candidates:
            chosen = draw.choice(candidates)
            return chosen, draw.choice(others(chosen))
    return NoPair("no allowed pair differs")


def _allowed(one: int, other: int, allowed: Sequence[tuple[int, int]] | None) -> bool:
    return allowed is None or (one, other) in allowed or (other, one) in allowed
