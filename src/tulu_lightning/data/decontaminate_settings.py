"""What a source is held against, and by which rule, as settings."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tulu_lightning.core.settings import require
from tulu_lightning.errors import InputError

if TYPE_CHECKING:
    from tulu_lightning.data.sources import Source

__all__ = ["EMBEDDER", "Decontaminate", "Evaluation"]

EMBEDDER = "tulu_lightning.models.embed.embed_texts"


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
    mode: Literal["ngram", "exact", "embedding"] = "ngram"
    """`ngram`: by tokens within shared n-grams. `exact`: by whole turns with the same tokens. `embedding`: by the cosine
    of vectors that `model` makes of texts."""
    model: str | None = None
    """Of `embedding`: folder of a causal LM, or a known name."""
    similarity: float | None = None
    """Of `embedding`: a turn and an item with a larger cosine overlap. What is large depends on the model."""
    max_tokens: int = 512
    """Of `embedding`: of a text, only so many are read."""
    embedder: str = EMBEDDER
    """Of `embedding`: import path of a function of (texts, model, max_tokens) that returns a vector for each text."""
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
        known = self.mode in ("ngram", "exact", "embedding")
        require(known, "decontaminate.mode", repr(self.mode), "Use ngram, exact or embedding.")
        require(self.turns in ("user", "all"), "decontaminate.turns", repr(self.turns), "Use user or all.")
        require(self.short in ("whole", "never"), "decontaminate.short", repr(self.short), "Use whole or never.")
        require(self.n >= 1, "decontaminate.n", self.n, "Use at least 1.")
        self._check_mode()
        for name in ("item_share", "set_share"):
            value = getattr(self, name)
            require(0 <= value < 1, f"decontaminate.{name}", value, "It is a share: 0 to below 1.")
        if self.processes is not None:
            require(self.processes >= 1, "decontaminate.processes", self.processes, "Use at least 1, or null.")

    def _check_mode(self) -> None:
        """Refuse what the mode does not read, and ask for what it needs."""
        embedding = self.mode == "embedding"
        unread = {
            "n": (8, self.mode != "ngram"),
            "short": ("whole", self.mode != "ngram"),
            "item_share": (0.5, embedding),
            "model": (None, not embedding),
            "similarity": (None, not embedding),
            "max_tokens": (512, not embedding),
            "embedder": (EMBEDDER, not embedding),
        }
        for name, (default, idle) in unread.items():
            value = getattr(self, name)
            remedy = "Leave it out." if default is None else f"Leave it at {default}."
            what = f"{value}, and mode {self.mode} does not read it"
            require(not idle or value == default, f"decontaminate.{name}", what, remedy)
        if embedding:
            require(self.model is not None, "decontaminate.model", "left out", "Name a model folder: it embeds texts.")
            remedy = "Give a cosine, such as 0.98 for SmolLM2; docs/decontamination.md says how to find one."
            require(self.similarity is not None, "decontaminate.similarity", "left out", remedy)
            require(-1 <= (self.similarity or 0) < 1, "decontaminate.similarity", self.similarity, "Use -1 to below 1.")
            require(self.max_tokens >= 1, "decontaminate.max_tokens", self.max_tokens, "Use at least 1.")
