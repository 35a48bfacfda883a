"""Questions and worked examples as conversations, or as one text where there is no chat."""

from collections.abc import Sequence

from tulu_lightning.evaluation.task import Turn

__all__ = ["Shot", "conversation", "one_text"]

Shot = tuple[str, str]
"""A question as it is asked, and its answer."""


def conversation(
    question: str, shots: Sequence[Shot] = (), system: str = "", multi_turn: bool = True
) -> tuple[Turn, ...]:
    """Turns up to the question.

    Args:
        question: as it is asked.
        shots: worked examples: each a user's and an assistant's turn, or all in front of the question in its own turn.
        system: a description of the task; it opens the first user turn, as OLMES writes it.
        multi_turn: whether shots are turns of their own.
    """
    opening = f"{system}\n\n" if system else ""
    if not multi_turn:
        return (Turn("user", one_text(question, shots, system)),)
    turns = [turn for asked, answer in shots for turn in (Turn("user", asked), Turn("assistant", answer))]
    turns.append(Turn("user", question))
    return (Turn("user", opening + turns[0].content), *turns[1:])


def one_text(question: str, shots: Sequence[Shot] = (), system: str = "") -> str:
    """The description, the shots and the question, blank lines between them, as OLMES joins them.

    Example: `one_text("Q: 3?\\nA:", [("Q: 2?\\nA:", "2")])` is "Q: 2?\\nA: 2\\n\\nQ: 3?\\nA:".
    """
    parts = [f"{asked} {answer}" for asked, answer in shots]
    return "\n\n".join([*([system] if system else []), *parts, question])
