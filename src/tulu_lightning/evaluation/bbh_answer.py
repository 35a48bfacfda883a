"""The answer in a chain of thought on BIG-Bench Hard, as OLMES's `bbh:cot-v1` reads it, and whether it is right."""

import re
import string
from dataclasses import dataclass
from typing import ClassVar

from tulu_lightning.types import Verdict

__all__ = ["FORMS", "BBHAnswer", "answer_of"]

LETTER = r"\([A-Z]\)"
FORMS = {
    "boolean_expressions": "[tT]rue|[fF]alse",
    "causal_judgement": "[yY]es|[nN]o",
    "dyck_languages": r"[\]\)\}\> ]+",
    "formal_fallacies": "[iI]nvalid|[vV]alid",
    "multistep_arithmetic_two": r"-?\d+",
    "navigate": "[nN]o|[yY]es",
    "object_counting": r"\d+",
    "sports_understanding": "[yY]es|[nN]o",
    "web_of_lies": "[yY]es|[nN]o",
    "word_sorting": "[a-z ]+",
}
"""What an answer of a subtask looks like; of those that are not here, a letter in parentheses."""
PHRASES = (
    r"(?i)So the answer is ({})\.?",
    r"(?i)answer is ({})",
    r"(?i)answer:.*?({})",
    r"(?i)answer\b.*?({})",
    r"({})",
)
"""Where an answer stands, the surest first; the last match of the first that matches counts."""
WRAPPINGS = (("$", "$"), (r"\(", r"\)"), ("(", ")"), ("**", "**"), ("***", "***"), (r"\[", r"\]"), ("'", "'"))
WRAPPINGS += (("`", "`"), ('"', '"'))
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def answer_of(response: str, subtask: str) -> str:
    """The answer that a response gives to a question of a subtask; empty where it gives none.

    Example: `answer_of("Jo is third. So the answer is (B).", "logical_deduction_three_objects")` is "(B)".
    """
    form = FORMS.get(subtask, LETTER)
    phrases = [phrase.format(form) for phrase in PHRASES]
    if form == LETTER:
        phrases.append(r"\b([A-Z])\b")
    phrases.append(f"(?i)({form})")
    found = next((matches[-1] for phrase in phrases if (matches := re.findall(phrase, response))), "")
    for left, right in WRAPPINGS:
        if re.match(form, left) is None:  # a bracket of dyck_languages is the answer itself
            found = re.sub(rf"^{re.escape(left)}(.*){re.escape(right)}$", r"\1", found).strip()
    return f"({found})" if form == LETTER and len(found) == 1 else found


@dataclass(frozen=True)
class BBHAnswer:
    """Right when the answer equals the target, case and punctuation aside; the target is "SUBTASK: ANSWER".

    Punctuation counts in dyck_languages. Unlike OLMES, which drops every hyphen, the sign of a number counts too.
    """

    runs: ClassVar = "pool"  # the patterns take time quadratic in the text

    def __call__(self, response: str, target: str) -> Verdict:
        """Score 1 or 0; unparseable without an answer."""
        subtask, _, gold = target.partition(": ")
        answer = answer_of(response, subtask)
        if not answer:
            return Verdict("unparseable", 0.0)
        right = _plain(answer, subtask) == _plain(gold, subtask)
        return Verdict("right" if right else "wrong", float(right))

    def complaint(self, target: str) -> str | None:
        """Why the target cannot be used, or None."""
        subtask, colon, gold = target.partition(": ")
        return None if subtask and colon and gold.strip() else f"{target!r} is not SUBTASK: ANSWER"


def _plain(text: str, subtask: str) -> str:
    text = text.strip().lower()
    if subtask == "dyck_languages":
        return text
    sign = "-" if FORMS.get(subtask) == r"-?\d+" and text.startswith("-") else ""
    return sign + text.translate(_PUNCTUATION)
