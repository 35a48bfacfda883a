"""What an evaluation task is: examples, how they are asked, and how an answer becomes a score.

A task is data: a name, a version, settings, a function from a row to an `Example`. Whatever changes what is asked or how
it is judged raises the version: scores of two versions do not compare.
"""

import hashlib
import inspect
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from tulu_lightning.core.settings import require
from tulu_lightning.errors import InputError
from tulu_lightning.verifiers.registry import Verifier, get

__all__ = ["Average", "Example", "Row", "Task", "Turn", "digest_of"]

Row = Mapping[str, Any]
"""One row of a data set, as it comes."""
Average = Literal["micro", "macro"]
"""`micro`: every item counts the same; `macro`: every group does (subjects of MMLU, types of MATH)."""

MISREAD = (KeyError, TypeError, AttributeError, IndexError, ValueError)
"""What reading a row raises that lacks a field, or holds something else in it."""
FIELDS = "Give rows with the fields of the data set that docs/evaluation.md names for the task."
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+>")
"""In the `repr` of an object whose class has none of its own: another one in each process."""


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

    def digest(self) -> str:
        """Hash of all of it: an answer under the same key belongs to it only if that is the same."""
        return digest_of(list(self))


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
        """All examples, or so many spread evenly over the data set: over each group where groups count the same.

        Then every group is in them if the limit has room for it.

        Raises:
            InputError: the data set is not there, or what judges the answers is not (its `ready()` says so); a row is not as
                the task reads it, two rows have one key, or the judge cannot use a row's target.
        """
        ready = getattr(self.own, "ready", None)
        if ready is not None:
            ready()
        found = self._taken(self._rows(), limit)
        self._check(found)
        return found

    def _rows(self) -> Sequence[Row]:
        where = f"task {self.name}"
        try:
            rows = self.rows()
        except InputError:
            raise
        except MISREAD as error:
            raise InputError(where, f"a row {_fault(error)}", FIELDS) from error
        if not rows:
            raise InputError(where, "its data set has no rows", "Give a file with some.")
        return rows

    def _taken(self, rows: Sequence[Row], limit: int | None) -> list[Example]:
        if limit is None or limit >= len(rows):
            return [self._example(row, place) for place, row in enumerate(rows)]
        if self.average == "micro":
            return [self._example(rows[place], place) for place in spread(range(len(rows)), limit)]
        every = [self._example(row, place) for place, row in enumerate(rows)]
        members: dict[str, list[int]] = {}
        for place, example in enumerate(every):
            members.setdefault(example.group, []).append(place)
        if limit < len(members):
            return [every[place] for place in spread(range(len(every)), limit)]
        counts = shares([len(each) for each in members.values()], limit)
        taken = [spread(each, count) for each, count in zip(members.values(), counts, strict=True)]
        return [every[place] for place in sorted(itertools.chain.from_iterable(taken))]

    def _example(self, row: Row, place: int) -> Example:
        try:
            return self.example(row, place)
        except InputError:
            raise
        except MISREAD as error:
            fields = f" (it has: {', '.join(map(str, row))})" if isinstance(row, Mapping) else f" (it is {row!r:.80})"
            raise InputError(f"task {self.name}, row {place + 1}", f"{_fault(error)}{fields}", FIELDS) from error

    def _check(self, examples: Sequence[Example]) -> None:
        """Refuse what would be scored falsely: two items of one key, and a target that no answer could be held against."""
        judge = get(self.verifier) if self.own is None else self.own
        seen = set[str]()
        for example in examples:
            if example.key in seen:
                what = "two rows of the data set are called so"
                raise InputError(f"task {self.name}, {example.key}", what, "Give each row an id or key of its own.")
            seen.add(example.key)
            text = isinstance(example.target, str)
            if (
                complaint := judge.complaint(example.target)
                if text
                else f"its target is {example.target!r}, not a text"
            ):
                remedy = "Correct the row, or leave it out: no answer to it could be judged."
                raise InputError(f"task {self.name}, {example.key}", complaint, remedy)

    def settings(self, examples: Sequence[Example]) -> str:
        """Hash of everything but the weights and the tokenizer: what is asked, how it is sampled and how it is judged."""
        asked = [list(example) for example in examples]
        return digest_of([*self.manner(), asked])

    def manner(self) -> list[Any]:
        """How each example is sampled and judged, as plain data: what `settings` hashes besides the examples."""
        drawn = [self.max_new_tokens, self.temperature, self.top_p, self.samples, self.k, self.stops, self.chat]
        judged = [self.verifier, "" if self.own is None else _described(self.own), self.average]
        return [self.name, self.version, drawn, judged]

    def capped(self, cap: int | None) -> "Task":
        """The task with a lower cap of an answer than its own; the same where the cap is none, or not lower."""
        return self if cap is None or cap >= self.max_new_tokens else replace(self, max_new_tokens=cap)


def _fault(error: Exception) -> str:
    return f"has no field {error}" if isinstance(error, KeyError) else f"is not as the task reads it ({error})"


def _described(verifier: Verifier) -> str:
    """What judges, in words that are the same in every process.

    That is its `repr`, or where an address is in that: its class, and those of its public attributes that are plain data.
    """
    if not ADDRESS.search(repr(verifier)):
        return repr(verifier)
    kind, members = type(verifier), inspect.getmembers_static(verifier)
    plain = {name: value for name, value in members if not name.startswith("_") and _is_plain(value)}
    return f"{kind.__module__}.{kind.__qualname__} {json.dumps(plain, sort_keys=True)}"


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold a value."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str)


def spread(places: Sequence[int], count: int) -> list[int]:
    """So many of the places, at even distances."""
    return [places[number * len(places) // count] for number in range(count)]


def shares(sizes: Sequence[int], count: int) -> list[int]:
    """How many of `count` each group gets: at least one, else in proportion to its size, and never more than it has.

    Example: groups of 100, 10 and 3 share 8 as 6, 1, 1: one each, and the rest to whoever has the most items for each of its own.
    """
    found = [1] * len(sizes)
    for _ in range(count - len(sizes)):
        open_ = [place for place, size in enumerate(sizes) if found[place] < size]
        found[max(open_, key=lambda place: sizes[place] / found[place])] += 1
    return found


def digest_of(content: Any) -> str:
    """Hash of plain data: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
