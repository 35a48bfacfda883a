"""Instruction prompts with constraints that a program can check: training data for RLVR out of any chat rows."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tulu_lightning.assets.constraints import DRAWS, Constraint, Dice, clash, ground_truth
from tulu_lightning.errors import InputError, nearest

__all__ = ["constrained", "draw_constraints"]

AT_MOST = 3


def constrained(
    rows: Iterable[Mapping[str, Any]], seed: int = 0, kinds: Sequence[str] = tuple(DRAWS)
) -> list[dict[str, Any]]:
    """Rows with one to three constraints appended to the user's last message, drawn so that all can be followed at once.

    Example: `constrained([{"messages": [{"role": "user", "content": "Describe a river."}]}], kinds=["punctuation:no_comma"])`
    asks "Describe a river. Do not use any commas."

    Args:
        rows: each with `messages` that end with a user turn; or with the answer to one, which is dropped.
        seed: decides what is drawn, together with the row's place and its text.
        kinds: IFEval's instruction ids to draw from, each as likely as the others.

    Returns:
        For each row `messages`, `ground_truth` (JSON as the verifier `ifeval` reads it), `verifier` and `dataset`
        (both `ifeval`) and `constraint` (what was appended).

    Raises:
        InputError: a kind that does not exist, or a row without a user turn.
    """
    if not kinds:
        raise InputError("constrained: kinds", "it is empty", "Name at least one of IFEval's instruction ids.")
    for kind in kinds:
        if kind not in DRAWS:
            raise InputError("constrained: kinds", f"there is no constraint {kind!r}", nearest(kind, DRAWS))
    return [_constrained(number, row, seed, kinds) for number, row in enumerate(rows, 1)]


def _constrained(number: int, row: Mapping[str, Any], seed: int, kinds: Sequence[str]) -> dict[str, Any]:
    messages = list(row.get("messages") or ())
    if messages and messages[-1].get("role") == "assistant":
        messages.pop()
    if not messages or messages[-1].get("role") != "user":
        remedy = "Give messages that end with a user turn, or with the answer to one."
        raise InputError(f"constrained: row {number}", "it has no user turn to add constraints to", remedy)
    prompt = messages[-1]["content"]
    drawn = _draw(Dice(seed, number, prompt), prompt, kinds)
    text = with_sentences(prompt, [constraint.text for constraint in drawn])
    return {
        "messages": [*messages[:-1], {**messages[-1], "content": text}],
        "ground_truth": ground_truth(text, drawn),
        "verifier": "ifeval",
        "dataset": "ifeval",
        "constraint": " ".join(constraint.text for constraint in drawn),
    }


def with_sentences(prompt: str, sentences: Sequence[str]) -> str:
    """A prompt with what is asked of its answer behind it; a paragraph of its own where the prompt has lines."""
    gap = "\n\n" if "\n" in prompt else " "
    return prompt + gap + " ".join(sentences)


def draw_constraints(seed: object, prompt: str, kinds: Sequence[str], at_most: int = AT_MOST) -> list[Constraint]:
    """One to `at_most` constraints for a prompt, drawn so that all can be followed at once.

    Args:
        seed: with the prompt's text it decides what is drawn.
        prompt: what the user asks.
        kinds: IFEval's instruction ids to draw from, each as likely as the others.
        at_most: 1 to 3.
    """
    return _draw(Dice(seed, prompt), prompt, kinds, at_most)


def _draw(dice: Dice, prompt: str, kinds: Sequence[str], at_most: int = AT_MOST) -> list[Constraint]:
    wanted, drawn = 1 + dice.below(at_most), []
    for kind in dice.some(kinds, len(kinds)):
        if len(drawn) < wanted and not any(clash(kind, other.id) for other in drawn):
            drawn.append(Constraint(kind, *DRAWS[kind](dice, prompt)))
    return drawn
