"""HREF's judge (Lyu et al. 2024): is a response better than a baseline's, by a person's answer, a model, or both."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.alpaca_judge import switched
from tulu_lightning.evaluation.bert_f1 import BertF1
from tulu_lightning.evaluation.judges import Source, judge_of, server_of
from tulu_lightning.types import Verdict

__all__ = ["METHODS", "HrefJudge", "preferred", "question_of"]

NAME, SIMILARITY = "href", "href_similarity"
METHODS: Mapping[str, str] = {
    "Brainstorm": "judge",
    "Open QA": "similarity",
    "Closed QA": "judge with reference",
    "Extract": "judge with reference",
    "Generation": "judge with reference",
    "Rewrite": "judge with reference",
    "Summarize": "judge",
    "Classify": "judge with reference",
    "Fact Checking or Attributed QA": "similarity",
    "Multi-Document Synthesis": "judge with reference",
    "Reasoning Over Numerical Data": "judge with reference",
}
"""How each kind of instruction is judged (the authors' suite `href`)."""
ASK = (
    "Two assistants were given the same instruction. Decide whose response a careful person would rather have: the one that does "
    "what was asked, all of it and nothing else, and says nothing false. Neither length nor the order below counts.{about}\n\n"
    "# Instruction\n{instruction}{reference}\n\n# Response 1\n{first}\n\n# Response 2\n{second}\n\n"
    "# Your decision\nWrite one line and nothing more: `Better: 1`, `Better: 2`, or `Better: tie`."
)
ABOUT = " A person's own response is shown as a guide: a good response agrees with it in what matters; its wording may differ."
OPTIONS = {"max_tokens": 16, "temperature": 0}
_LINE = re.compile(r"better\W+(1|2|tie)\b", re.IGNORECASE)


def question_of(instruction: str, first: str, second: str, reference: str | None) -> str:
    """What the judge is asked, in our words: the authors' are in their repository alone."""
    slots = {
        "about": ABOUT if reference is not None else "",
        "reference": f"\n\n# A person's response\n{reference}" if reference is not None else "",
        "instruction": instruction,
        "first": first,
        "second": second,
    }
    return re.sub(r"\{(\w+)\}", lambda match: slots[match[1]], ASK)  # in one pass: braces in texts stay as they are


def preferred(text: str) -> str | None:
    """`1`, `2` or `tie` of the last decision in a judge's answer; None where there is none."""
    found = _LINE.findall(text)
    return found[-1].lower() if found else None


@dataclass(frozen=True, repr=False)
class HrefJudge:
    """Score: 1 where the response is better than the baseline's, 0.5 for a tie, else 0.

    The target is a JSON object with `instruction`, `category`, `baseline` and `reference`. The order of the two is drawn by the
    instruction. Equal texts tie unasked; a judge that does not decide makes the outcome `unparseable`, score 0.
    """

    runs: ClassVar = "thread"
    similarity: BertF1 = field(default_factory=BertF1, compare=False)

    def __repr__(self) -> str:
        """Names both judges: scores of others do not compare."""
        return f"HrefJudge({judge_of(NAME).model}, {judge_of(SIMILARITY).model})"

    def ready(self) -> None:
        """Ask the judge for one token, and look for the model that embeds.

        Raises:
            InputError: one is not named or not there.
        """
        source = server_of(NAME)
        self.similarity.check(_embedder().model)
        source.check()

    def __call__(self, response: str, target: str) -> Verdict:
        """Score in {0, 0.5, 1}.

        Raises:
            InputError: the judge does not answer.
        """
        asked = json.loads(target)
        if response == asked["baseline"]:
            return Verdict("wrong", 0.5)
        method = METHODS[asked["category"]]
        if method == "similarity":
            own, other = (
                self.similarity(_embedder().model, text, asked["reference"]) for text in (response, asked["baseline"])
            )
            return _verdict(0.5 if own == other else float(own > other))
        return self._by_model(response, asked, asked["reference"] if "reference" in method else None)

    def _by_model(self, response: str, asked: Mapping[str, str], reference: str | None) -> Verdict:
        turned = switched(asked["instruction"])
        first, second = (response, asked["baseline"]) if turned else (asked["baseline"], response)
        question = question_of(asked["instruction"], first, second, reference)
        said = preferred(judge_of(NAME).chat([{"role": "user", "content": question}], **OPTIONS).text)
        if said is None:
            return Verdict("unparseable", 0.0)
        return _verdict(0.5 if said == "tie" else float(said == ("1" if turned else "2")))

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None."""
        try:
            asked = json.loads(target)
            sound = all(isinstance(asked[name], str) for name in ("instruction", "category", "baseline", "reference"))
        except (ValueError, KeyError, TypeError):
            return f"{target[:80]!r} is no JSON object with instruction, category, baseline and reference"
        if sound and asked["category"] not in METHODS:
            return f"there is no category {asked['category']!r}"
        return None if sound else f"{target[:80]!r} holds what is no text"


def _verdict(score: float) -> Verdict:
    return Verdict("right" if score > 0.5 else "wrong", score)


def _embedder() -> Source:
    source = judge_of(SIMILARITY)
    if source.url:
        raise InputError(f"judge {SIMILARITY}", "is a server", "Give a model folder, or FacebookAI/roberta-large.")
    return source
