"""What an evaluation task is: examples, how they are asked, and how an answer becomes a score.

A task is data: a name, a version, settings, a function from a row to an `Example`. Whatever changes what is asked or how
it is judged raises the version: scores of two versions do not compare.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from tulu_lightning.core.settings import require
from tulu_lightning.verifiers.registry import Verifier

__all__ = ["Average", "Example", "Row", "Task", "Turn"]

Row = Mapping[str, Any]
"""One row of a data set, as it comes."""
Average = Literal["micro", "macro"]
"""`micro`: every item counts the same; `macro`: every group does (subjects of MMLU, types of MATH)."""


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


class Example(NamedTuple):
    """One thing to ask."""

    key: str
    """What it is called in its data set, e.g. gsm8k/17: the same in every run, so that scores can be paired."""
    turns: tuple[Turn, ...]
    """The conversation up to the question, shots included where they are turns of their own. A task without chat has
    one turn, the whole text."""
    target: str
    """What `Task.judge` holds the answer against."""
    group: str = ""
    """Subject or kind, for `Average`."""
    prefix: str = ""
    """Words that are put into the assistant's mouth: the answer goes on from there."""
    choices: tuple[str, ...] = ()
    """Continuations that are ranked by their log-probs; with them nothing is sampled."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """An evaluation task."""

    name: str
    """As the suites and the command line call it."""
    version: int
    skill: str
    """What the paper's tables list it under: Knowledge, Reasoning, Math, Code, IF, Chat, Safety."""
    rows: Callable[[], Sequence[Row]] = field(repr=False)
    """Reads the data set; an InputError says what would provide it."""
    example: Callable[[Row, int], Example] = field(repr=False)
    """A row, by its place in the data set, as it is asked."""
    verifier: str
    """Name of the verifier that judges answers; see `own`."""
    own: Verifier | None = field(default=None, repr=False)
    """The verifier itself where the package's registry does not have it under `verifier`."""
    metric: str = "exact match"
    """For people."""
    average: Average = "micro"
    chat: bool = True
    """Whether the model's chat template is used."""
    shots: int = 0
    multi_turn: bool = False
    """Whether shots are turns of their own."""
    cot: bool = False
    """Whether reasoning is asked for."""
    max_new_tokens: int = 4096
    """Section 2.4 of the paper."""
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    """Answers to each example."""
    k: int = 1
    """With more samples than one: the score of an example is pass@k (Chen et al. 2021), unbiased."""
    finish: Callable[[Sequence[Any]], list[Any]] | None = field(default=None, repr=False)
    """Gives the items (`result.Item`) of a whole task their scores, where a score hangs on all answers."""
    stops: tuple[str, ...] = ()
    """Texts that end an answer; what comes after the first of them is not read."""
    source: str = ""
    """Where the settings are from."""

    def __post_init__(self) -> None:
        where = f"task {self.name}"
        require(self.version >= 1, f"{where}.version", self.version, "Use at least 1.")
        require(1 <= self.k <= self.samples, f"{where}.k", self.k, f"Use 1 to samples ({self.samples}).")
        require(
            self.samples == 1 or self.temperature > 0, f"{where}.samples", self.samples, "Greedy answers are equal."
        )

    def examples(self, limit: int | None = None) -> list[Example]:
        """All examples, or the first so many spread evenly over the data set (every group is in them then).

        Raises:
            InputError: the data set is not there, or what judges the answers is not (its `ready()` says so).
        """
        ready = getattr(self.own, "ready", None)
        if ready is not None:
            ready()
        rows = self.rows()
        places: Iterable[int] = range(len(rows))
        if limit is not None and limit < len(rows):
            places = (place * len(rows) // limit for place in range(limit))
        return [self.example(rows[place], place) for place in places]

    def settings(self, examples: Sequence[Example]) -> str:
        """Hash of everything but the weights and the tokenizer: what is asked, how it is sampled and how it is judged."""
        drawn = [self.max_new_tokens, self.temperature, self.top_p, self.samples, self.k, self.stops, self.chat]
        judged = [self.verifier, "" if self.own is None else repr(self.own), self.average]
        asked = [list(example) for example in examples]
        content = json.dumps([self.name, self.version, drawn, judged, asked])
        return hashlib.sha256(content.encode()).hexdigest()[:16]
