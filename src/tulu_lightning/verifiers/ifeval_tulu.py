"""Tülu 3's training constraints: a target names one of the release's functions and its arguments.

A target is a JSON object with `func_name` and that function's arguments (those it does not use are null), or a list of
such objects. `ifeval_tulu_rules` says what each asks and where the release judged wrongly.
"""

from dataclasses import dataclass
from typing import ClassVar

from tulu_lightning.types import Verdict
from tulu_lightning.verifiers import ifeval_tulu_release, ifeval_tulu_rules
from tulu_lightning.verifiers.ifeval import Asked, judge, read_json
from tulu_lightning.verifiers.ifeval_schema import find_rule, read_arguments

__all__ = ["IFEvalTulu"]

HEADER = "<|assistant|>\n"


@dataclass(frozen=True)
class IFEvalTulu:
    """Right when every constraint is followed by what stands behind the last assistant header, without the white space
    around it; unparseable when that is blank."""

    loose: bool = False
    """As for official IFEval: without the first line, the last or both, with and without asterisks."""
    partial: bool = False
    """The score of a wrong response is the share of constraints that it follows, not 0."""
    release: bool = False
    """Judge as the release did, mistakes and all."""
    runs: ClassVar = "pool"

    def __call__(self, response: str, target: str) -> Verdict:
        """Score 1 or 0, or the share that is followed.

        Raises:
            ValueError: the target is not usable; `complaint` says so beforehand.
        """
        return judge(self._read(target), response.rpartition(HEADER)[2].strip(), self.loose, self.partial)

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used (an unknown function, a missing argument, ...), or None."""
        try:
            asked = self._read(target)
        except ValueError as error:
            return str(error)
        return next((found for rule, arguments in asked if (found := rule.complaint(arguments))), None)

    def _read(self, target: str) -> Asked:
        rules = ifeval_tulu_release.RULES if self.release else ifeval_tulu_rules.RULES
        given = read_json(target)
        asked = []
        for constraint in given if isinstance(given, list) else [given]:
            if not isinstance(constraint, dict) or "func_name" not in constraint:
                raise ValueError(
                    f"{target[:60]!r} is not an object with func_name and its arguments, or a list of them"
                )
            name = constraint["func_name"]
            rule = find_rule(rules, name)
            others = {key: value for key, value in constraint.items() if key != "func_name"}
            asked.append((rule, read_arguments(name, rule, others)))
        if not asked:
            raise ValueError("the list of constraints is empty")
        return asked
