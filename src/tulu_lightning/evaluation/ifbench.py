"""Constraints that are not among IFEval's 25, checked by the authors' own checkers out of the package if-verifiable."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

from tulu_lightning.errors import InputError
from tulu_lightning.types import Verdict
from tulu_lightning.verifiers.if_text import relaxed

__all__ = ["IFBench", "checkers"]

PACKAGE = "if-verifiable"


def checkers() -> Mapping[str, Any]:
    """Checker classes by the name of their constraint.

    Raises:
        InputError: the package is not there, or a word list or model that it reads.
    """
    try:
        return import_module("if_verifiable.ifbench.instructions_registry").INSTRUCTION_DICT
    except (ImportError, LookupError, OSError) as error:
        what = f"the checkers of its constraints cannot be loaded ({str(error).strip().splitlines()[0]})"
        raise InputError("task ifeval_ood", what, f"pip install {PACKAGE}==0.1.2.") from error


@dataclass(frozen=True)
class IFBench:
    """Right when every constraint is followed, in the response or in one of its relaxed readings (loose).

    The target is a JSON object with `prompt`, `instruction_id_list` and `kwargs`, as IFBench's rows have them.
    """

    runs: ClassVar = "pool"

    def ready(self) -> None:
        """Load the checkers, and try those that read data of nltk's.

        Raises:
            InputError: as `checkers`; or such data are not there.
        """
        for name in ("words:start_verb", "ratio:sentence_type"):
            checker = checkers()[name](name)
            checker.build_description()
            try:
                checker.check_following("Go home. They went.")
            except LookupError:
                what = f"what {name} reads of nltk's data is not on this machine"
                remedy = "Run `python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng`, or set NLTK_DATA."
                raise InputError("task ifeval_ood", what, remedy) from None

    def warm(self) -> None:
        """Import what a call needs."""
        checkers()

    def __call__(self, response: str, target: str) -> Verdict:
        """Score 1 or 0."""
        asked = json.loads(target)
        readings = [reading for reading in relaxed(response) if reading.strip()]
        if not readings:
            return Verdict("unparseable", 0.0)
        pairs = zip(asked["instruction_id_list"], asked["kwargs"], strict=True)
        right = all(self._followed(name, settings, asked["prompt"], readings) for name, settings in pairs)
        return Verdict("right" if right else "wrong", float(right))

    def _followed(self, name: str, settings: Mapping[str, Any], prompt: str, readings: Sequence[str]) -> bool:
        checker = checkers()[name](name)
        checker.build_description(**{key: value for key, value in settings.items() if value is not None})
        if "prompt" in (checker.get_instruction_args() or {}):
            checker.build_description(prompt=prompt)
        return any(bool(checker.check_following(reading)) for reading in readings)

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None."""
        try:
            asked = json.loads(target)
            sound = len(asked["instruction_id_list"]) == len(asked["kwargs"]) > 0 and isinstance(asked["prompt"], str)
        except (ValueError, KeyError, TypeError):
            sound = False
        return None if sound else f"{target[:80]!r} has no prompt, instruction_id_list and kwargs"
