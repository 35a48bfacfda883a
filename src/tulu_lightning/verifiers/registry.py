"""Verifiers by name. To add one: write its file in this folder, and one line here."""

from collections.abc import Iterator, Mapping
from typing import Literal, Protocol, runtime_checkable

from tulu_lightning.errors import InputError, nearest
from tulu_lightning.types import Verdict
from tulu_lightning.verifiers.code import Code
from tulu_lightning.verifiers.exact import Exact
from tulu_lightning.verifiers.gsm8k_release import Gsm8kRelease
from tulu_lightning.verifiers.ifeval import IFEval
from tulu_lightning.verifiers.ifeval_tulu import IFEvalTulu
from tulu_lightning.verifiers.last_number import LastNumber
from tulu_lightning.verifiers.math_answer import Math, MathStrict
from tulu_lightning.verifiers.math_release import MathRelease
from tulu_lightning.verifiers.multiple_choice import MultipleChoice
from tulu_lightning.verifiers.regex import Regex
from tulu_lightning.verifiers.string_f1 import StringF1

__all__ = ["VERIFIERS", "Runs", "Verifier", "Verifiers", "check_target", "get", "runs_in"]

Runs = Literal["here", "pool", "thread"]
"""Where a verifier is called: in the calling process (time linear in the text, cannot hang), in a process of the
scoring pool that can be killed (anything else), or in a thread (waits for a server)."""


@runtime_checkable  # a config that names a class of one is checked against it
class Verifier(Protocol):
    """Judges a response by its text alone: picklable, and deterministic unless a server answers for it.

    A class may have `runs` (see `Runs`); without it, it is called in the pool. It may have `warm()`, which loads what
    calls need (imports, word lists): the pool calls it once, so that no call pays for it out of its time limit.
    """

    def __call__(self, response: str, target: str) -> Verdict:
        """The verdict on a response, whatever it holds; a bad target may raise ValueError."""
        ...

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None; asked when data are read."""
        ...


VERIFIERS: dict[str, Verifier] = {
    "code": Code(),
    "exact": Exact(),
    "gsm8k": LastNumber(),
    "gsm8k_release": Gsm8kRelease(),
    "ifeval": IFEval(),
    "ifeval_loose": IFEval(loose=True),
    "ifeval_tulu": IFEvalTulu(),
    "ifeval_tulu_loose": IFEvalTulu(loose=True),
    "ifeval_tulu_release": IFEvalTulu(release=True),
    "last_number": LastNumber(),
    "math": Math(),
    "math_release": MathRelease(),
    "math_strict": MathStrict(),
    "multiple_choice": MultipleChoice(),
    "regex": Regex(),
    "string_f1": StringF1(),
}


class Verifiers(Mapping[str, Verifier]):
    """The verifiers of a run: those that come with the package, and the run's own, which win.

    Args:
        own: by name, e.g. a judge with its rubric.
    """

    def __init__(self, own: Mapping[str, Verifier] | None = None) -> None:
        self._own = dict(own or {})

    def __getitem__(self, name: str) -> Verifier:
        """The verifier of that name.

        Raises:
            InputError: no verifier has that name; offers the nearest one.
        """
        if name in self._own:
            return self._own[name]
        if name not in VERIFIERS:
            raise InputError("verifier", f"there is no verifier {name!r}", nearest(name, self))
        return VERIFIERS[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**VERIFIERS, **self._own})

    def __len__(self) -> int:
        return len({**VERIFIERS, **self._own})

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in VERIFIERS

    def complaint(self, name: str, target: str) -> str | None:
        """Why the named verifier cannot use the target (e.g. "'sixty' is not a number"), or None if it can."""
        return self[name].complaint(target)


def get(name: str) -> Verifier:
    """The package's verifier of that name.

    Raises:
        InputError: no verifier has that name; offers the nearest one.
    """
    return Verifiers()[name]


def check_target(name: str, target: str) -> str | None:
    """Why the package's verifier of that name cannot use the target, or None if it can."""
    return Verifiers().complaint(name, target)


def runs_in(verifier: Verifier) -> Runs:
    """Where a verifier is called."""
    return getattr(verifier, "runs", "pool")
