"""What a source is held against, and by which rule, as settings."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tulu_lightning.core.settings import require
from tulu_lightning.errors import InputError

if TYPE_CHECKING:
    from tulu_lightning.data.sources import Source

__all__ = ["Decontaminate", "Evaluation"]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation set: rows, and which of their fields are the test text.

    Example: `Evaluation("gsm8k", hub="openai/gsm8k", subset="main", split="test", fields=["question"])`.
    """

    name: str
    """How reports call it."""
    path: str | None = None
    """As in `Source`."""
    hub: str | None = None
    """As in `Source`."""
    rows: str | None = None
    """As in `Source`."""
    args: dict[str, Any] = field(default_factory=dict)
    """As in `Source`."""
    subset: str | None = None
    """As in `Source`."""
    split: str | None = None
    """As in `Source`."""
    revision: str | None = None
    """As in `Source`."""
    match: dict[str, str | list[str]] = field(default_factory=dict)
    """As in `Source`."""
    limit: int | None = None
    """As in `Source`."""
    fields: list[str] = field(default_factory=list)
    """Names of the fields; an item's share is the mean over them. With dots into objects: doc.question. A list of texts is
    one text. Left out: the user turns of `messages`."""

    def source(self) -> "Source":
        """The same as a source, to be opened."""
        from tulu_lightning.data.sources import Source

        names = ("name", "path", "hub", "rows", "args", "subset", "split", "revision", "match", "limit")
        return Source(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Decontaminate:
    """Leave out what repeats evaluation sets (Tülu 3, section 3.2)."""

    evaluations: list[Evaluation]
    """What the rows are held against."""
    action: Literal["report", "drop_rows", "drop_source"] = "drop_rows"
    """Of a source that contaminates a set: say so; leave out the rows that overlap with its items; leave out the source."""
    mode: Literal["ngram", "exact"] = "ngram"
    """`ngram`: by tokens within shared n-grams. `exact`: by whole turns with the same tokens."""
    n: int = 8
    """Tokens of an n-gram."""
    short: Literal["whole", "never"] = "whole"
    """Test texts with fewer tokens than that match a turn that is the same as a whole, or, as in the release, never."""
    item_share: float = 0.5
    """An item overlaps with a row if more than this share of its tokens matches."""
    set_share: float = 0.02
    """A source contaminates a set if more than this share of its items overlaps. 0: any item does."""
    turns: Literal["user", "all"] = "user"
    """Which turns of a row are read."""
    processes: int | None = None
    """How many look at a large source at once; as many as there are CPUs if null."""

    def __post_init__(self) -> None:
        if not self.evaluations:
            raise InputError("decontaminate.evaluations", "there is none", "Give at least one set.")
        names = [each.name for each in self.evaluations]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(
                "decontaminate.evaluations", f"{twice[0]!r} is there twice", "Give each a name of its own."
            )
        known = self.action in ("report", "drop_rows", "drop_source")
        require(known, "decontaminate.action", repr(self.action), "Use report, drop_rows or drop_source.")
        require(self.mode in ("ngram", "exact"), "decontaminate.mode", repr(self.mode), "Use ngram or exact.")
        require(self.turns in ("user", "all"), "decontaminate.turns", repr(self.turns), "Use user or all.")
        require(self.short in ("whole", "never"), "decontaminate.short", repr(self.short), "Use whole or never.")
        require(self.n >= 1, "decontaminate.n", self.n, "Use at least 1.")
        if self.mode == "exact":
            require(self.n == 8, "decontaminate.n", f"{self.n}, and mode exact does not read it", "Leave it at 8.")
            what = f"{self.short}, and mode exact does not read it"
            require(self.short == "whole", "decontaminate.short", what, "Leave it out.")
        for name in ("item_share", "set_share"):
            value = getattr(self, name)
            require(0 <= value < 1, f"decontaminate.{name}", value, "It is a share: 0 to below 1.")
        if self.processes is not None:
            require(self.processes >= 1, "decontaminate.processes", self.processes, "Use at least 1, or null.")
