"""How the unseen suite asks for a letter: reasons in brief, the last sentence fixed (section 7.3.1 of the paper)."""

from collections.abc import Sequence

__all__ = ["in_letters", "options"]

ASKED = (
    "Answer the following multiple-choice question by giving the correct answer letter in parentheses. Provide CONCISE "
    'reasoning for the answer, and make sure to finish the response with "Therefore, the answer is (ANSWER_LETTER)" where '
    "(ANSWER_LETTER) is one of {letters}.\n\n"
)
REMINDED = (
    "Answer the above question and REMEMBER to finish your response with the exact phrase "
    '"Therefore, the answer is (ANSWER_LETTER)" where (ANSWER_LETTER) is one of {letters}.'
)
LETTERS = "ABCDEFGHIJ"
MANY = "(A), (B), (C), (D), (E), etc."
"""What the letters are called where a question may have more than four."""


def in_letters(question: str, letters: str = MANY) -> str:
    """A question with its options, between what is asked and a reminder of it.

    Args:
        question: white space at its end decides how far the reminder stands from it.
        letters: those that there are.
    """
    return ASKED.format(letters=letters) + question + REMINDED.format(letters=letters)


def options(choices: Sequence[str]) -> str:
    """Lines " (A) text", one a choice.

    Raises:
        TypeError: they are one text, as a CSV file has them.
        ValueError: there are more than ten.
    """
    if isinstance(choices, str):
        raise TypeError(f"the options are the text {choices!r:.60}, not a list")
    if len(choices) > len(LETTERS):
        raise ValueError(f"it has {len(choices)} options, and there are {len(LETTERS)} letters")
    return "".join(f" ({letter}) {choice}\n" for letter, choice in zip(LETTERS, choices, strict=False))
