"""Which rows of each source were kept, which were left out, and why."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError

__all__ = ["Counts", "LeftOut", "TooLong", "check_names", "check_source", "intake_table"]

Item = TypeVar("Item")


REMEDIES = {
    "with equal answers": "Give pairs whose two answers differ; look whether columns takes both from one field.",
    "whose rejected answer has the higher score": "Swap the columns (columns: {chosen: ..., rejected: ...}), or leave the scores out.",
    "with a tie": "Give pairs of which one answer was judged better, or leave the scores out.",
}
REMEDY = "Raise the limit or correct the rows, or leave the source out."
"""What to do about a source of which every row was left out, by the most frequent reason."""


class LeftOut(Exception):
    """Raised while a row is read, to leave it out; its text is the reason that the table shows."""


class TooLong(LeftOut):
    """Left out for its length, of which a source may lose only so much."""


@dataclass
class Counts:
    """What became of a source's rows."""

    rows: int = 0
    """Rows that the source has."""
    tried: int = 0
    """Rows that were looked at: all, or those that were drawn, up to the last one that was needed."""
    kept: int = 0
    truncated: int = 0
    """Kept rows of which the end was cut off."""
    too_long: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows by the reason for which they were left out; those too long are among them."""

    def take(self, outcomes: Iterable[Any], wanted: int | None = None) -> list[tuple[int, Any]]:
        """Count one outcome for each row, up to the last that is wanted.

        Args:
            outcomes: what is kept of each row, or the `LeftOut` that says why nothing is.
            wanted: rows to keep in all, with those that were counted before; None keeps every one.

        Returns:
            Place among the outcomes and outcome, of the rows that are kept.
        """
        kept: list[tuple[int, Any]] = []
        for place, outcome in enumerate(outcomes):
            if wanted is not None and self.kept >= wanted:
                break
            self.tried += 1
            if isinstance(outcome, LeftOut):
                self.left_out[str(outcome)] += 1
                self.too_long += isinstance(outcome, TooLong)
            else:
                self.kept += 1
                self.truncated += bool(getattr(outcome, "truncated", False))
                kept.append((place, outcome))
        return kept

    @property
    def reasons(self) -> str:
        """The reasons with their numbers, in words."""
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))


def check_names(sources: Sequence[Source], where: str = "data.sources") -> None:
    """Refuse a mixture of nothing, and names that do not tell its sources apart.

    Raises:
        InputError: no source, or two of one name.
    """
    if not sources:
        raise InputError(where, "there is no source", "Give at least one.")
    twice = [name for name, count in Counter(source.name for source in sources).items() if count > 1]
    if twice:
        raise InputError(where, f"two sources are called {twice[0]!r}", "Give each its own name.")


def check_source(source: Source, counts: Counts, max_dropped_share: float) -> None:
    """Refuse a source that gives nothing, less than was asked for, or loses too much for length.

    Raises:
        InputError: every row of it was left out, fewer than its `count` are left, or more than the share was too long.
    """
    where = f"source {source.name!r}"
    if not counts.kept:
        (reason, _), *_ = counts.left_out.most_common(1)
        remedy = REMEDIES.get(reason, REMEDY)
        raise InputError(where, f"every row was left out ({counts.reasons})", remedy)
    if source.count is not None and counts.kept < source.count:
        said = f" ({counts.reasons} were left out)" if counts.left_out else ""
        what = f"count is {source.count}, and only {counts.kept} of its rows are usable{said}"
        raise InputError(where, what, f"Ask for at most {counts.kept}, or use cap, which takes what is there.")
    if counts.too_long > max_dropped_share * counts.tried:
        share = counts.too_long / counts.tried
        what = (
            f"{counts.too_long} of {counts.tried} rows ({share:.0%}) are too long, more than max_dropped_share "
            f"({max_dropped_share:.0%}) allows"
        )
        remedy = "Raise max_tokens or max_dropped_share; conversations can also be cut (on_overflow: truncate)."
        raise InputError(where, what, remedy)


def intake_table(counts: dict[str, Counts]) -> str:
    """One line a source if any row was left out or cut, otherwise empty."""
    if not any(each.left_out or each.truncated for each in counts.values()):
        return ""
    width = max(map(len, counts))
    cut = any(each.truncated for each in counts.values())
    lines = [
        f"  {name:<{width}}  {each.kept:>8} kept  {f'{each.truncated:>8} cut  ' if cut else ''}"
        f"{each.left_out.total():>8} left out  {each.reasons}".rstrip()
        for name, each in counts.items()
    ]
    return "\n".join(["rows by source:", *lines])
