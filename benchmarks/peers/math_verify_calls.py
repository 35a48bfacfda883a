"""math-verify as its own page shows it, on a response and a target; also as a verifier, for the scoring pool."""

from dataclasses import dataclass
from typing import ClassVar

from math_verify import parse, verify

from tulu_lightning.types import Verdict


def call(response: str, target: str, seconds: int | None) -> bool:
    """Whether math-verify holds the response for right; `seconds` is its own limit (SIGALRM), None for none."""
    gold = parse(f"${target}$", parsing_timeout=seconds)
    return bool(verify(gold, parse(response, parsing_timeout=seconds), timeout_seconds=seconds))


@dataclass(frozen=True)
class MathVerifyCalls:
    runs: ClassVar = "pool"

    def __call__(self, response: str, target: str) -> Verdict:
        right = call(response, target, None)
        return Verdict("right" if right else "wrong", float(right))

    def complaint(self, target: str) -> str | None:
        return None
