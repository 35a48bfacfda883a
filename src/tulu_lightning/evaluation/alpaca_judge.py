"""AlpacaEval 2's judge: which of two answers a model would rather have, as a probability, in an order drawn for each."""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.judges import server_of
from tulu_lightning.evaluation.rows import package_file
from tulu_lightning.types import Verdict

__all__ = ["AlpacaJudge", "messages_of", "preference_of", "switched", "template"]

NAME = "alpaca_eval"
PACKAGE, FILE = "alpaca-eval", "alpaca_eval/evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
OPTIONS = {"max_tokens": 1, "temperature": 1, "logprobs": True, "top_logprobs": 5}
FIRST, SECOND = "m", "M"
"""What the two answers are called."""


def template() -> str:
    """The judge's question, as the authors' package has it.

    Raises:
        InputError: the package is not there.
    """
    path = package_file(PACKAGE, FILE)
    if path is None:
        remedy = f"It is in a package: pip install --no-deps {PACKAGE}==0.6.6."
        raise InputError(f"judge {NAME}", "the question that it is asked is not here", remedy)
    return path.read_text(encoding="utf-8")


def switched(instruction: str, seed: int = 0) -> bool:
    """Whether the model's answer comes first: drawn by the instruction, as the authors draw it."""
    return random.Random(f"is_switched_outputs{instruction}{seed}").choices([False, True], k=1)[0]


def messages_of(text: str, slots: Mapping[str, str]) -> list[dict[str, str]]:
    """The conversation of a template with ChatML marks, its slots filled in one pass."""
    messages = []
    for part in text.strip().split("<|im_start|>")[1:]:
        role, _, content = part.partition("\n")
        content = content.split("<|im_end|>", 1)[0].strip()
        pieces = content.split("{")  # a slot is {name}; other braces are text
        filled = pieces[0]
        for piece in pieces[1:]:
            name, brace, rest = piece.partition("}")
            filled += slots[name] + rest if brace and name in slots else "{" + piece
        messages.append({"role": role.strip(), "content": filled})
    return messages


def preference_of(first: Mapping[str, float] | None) -> float | None:
    """Probability of the second answer among the two names, out of the log-probs of the first token; None without both.

    Example: "m" at ln 0.2 and "M" at ln 0.6 give 0.75.
    """
    if first is None:
        return None
    weights = [math.exp(first[name]) if name in first else 0.0 for name in (FIRST, SECOND)]
    return weights[1] / sum(weights) if sum(weights) > 0 else None


@dataclass(frozen=True, repr=False)
class AlpacaJudge:
    """Score: the probability that the judge prefers the response to the baseline's; right above one half.

    The target is a JSON object with `instruction` and `baseline`. Equal texts score one half unasked.
    """

    runs: ClassVar = "thread"

    def __repr__(self) -> str:
        """Names the judge: scores of two judges do not compare."""
        return f"AlpacaJudge({server_of(NAME).model})"

    def ready(self) -> None:
        """Ask the judge for one token.

        Raises:
            InputError: none is named, it is down, or its question is not here.
        """
        template()
        server_of(NAME).check()

    def __call__(self, response: str, target: str) -> Verdict:
        """Score in [0, 1].

        Raises:
            InputError: the judge does not answer, or gives no log-probs.
        """
        asked = json.loads(target)
        instruction, answers = asked["instruction"], (asked["baseline"], response)
        if answers[0] == answers[1]:
            return Verdict("wrong", 0.5)
        turned = switched(instruction)
        first, second = reversed(answers) if turned else answers
        slots = {"instruction": instruction, "output_1": first, "output_2": second}
        source = server_of(NAME)
        reply = source.chat(messages_of(template(), slots), **OPTIONS)
        if reply.first is None:
            remedy = "Name a server that gives them (vllm serve does), run the same command again."
            raise InputError(f"judge {source.model} at {source.url}", "it gives no log-probs", remedy)
        score = preference_of(reply.first)
        if score is None:  # it named neither
            return Verdict("unparseable", 0.5)
        score = 1 - score if turned else score
        return Verdict("right" if score > 0.5 else "wrong", score)

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None."""
        try:
            asked = json.loads(target)
            sound = all(isinstance(asked[name], str) for name in ("instruction", "baseline"))
        except (ValueError, KeyError, TypeError):
            sound = False
        return None if sound else f"{target[:80]!r} has no instruction and baseline"
