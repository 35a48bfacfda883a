"""Two-digit arithmetic in plain chat form: a task that a small model half knows and a verifier can judge.

Which operand pairs are for training and which are held out is decided once, by a hash of the unordered pair and
nothing else. So no seed, count, operation or kind of row ever shows a held-out pair in training, in either order.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

from tulu_lightning.errors import InputError

__all__ = ["heldout_rows", "is_heldout", "pair_rows", "prompt_rows", "sft_rows"]

OPERANDS = range(10, 100)
HELDOUT_SHARE = 5  # one pair in so many is held out
WRONG_BY = (-10, -2, -1, 1, 2, 10)  # a dropped or invented carry, or a slip of the last digit
VERIFIER = "last_number"

Question = tuple[int, str, int]


def is_heldout(a: int, b: int) -> bool:
    """Whether the pair of operands, in either order, is kept out of all training rows."""
    return _hash("split", min(a, b), max(a, b)) % HELDOUT_SHARE == 0


def sft_rows(count: int, seed: int = 0, operations: str = "+") -> list[dict[str, Any]]:
    """Training rows with the answer alone as the reply.

    Args:
        count: number of rows; all are different.
        seed: decides which rows, and their order.
        operations: `+`, or `+-` to draw from subtractions too (larger minus smaller, about one row in three).

    Returns:
        Rows with `messages` (user, assistant).
    """
    return [
        {"messages": [_user(question), {"role": "assistant", "content": str(_answer(question))}]}
        for question in _training(count, seed, operations)
    ]


def prompt_rows(count: int, seed: int = 0, operations: str = "+") -> list[dict[str, Any]]:
    """Training questions for a verifier: `messages` (user), `ground_truth`, `verifier`. Arguments as `sft_rows`."""
    return [_prompt(question) for question in _training(count, seed, operations)]


def heldout_rows(count: int) -> list[dict[str, Any]]:
    """Held-out additions, one a pair, in a fixed order: 200 of them are the first 200 of 400.

    Returns:
        Rows as `prompt_rows` gives them.
    """
    pairs = [(a, b) for a in OPERANDS for b in OPERANDS if a <= b and is_heldout(a, b)]
    _check_count("heldout_rows", count, len(pairs))
    pairs.sort(key=lambda pair: _hash("order", *pair))
    # Which operand stands first is decided by the hash too, or the first would always be the smaller one.
    ordered = [(a, b) if _hash("turn", a, b) % 2 else (b, a) for a, b in pairs[:count]]
    return [_prompt((a, "+", b)) for a, b in ordered]


def pair_rows(count: int, seed: int = 0, operations: str = "+") -> list[dict[str, Any]]:
    """Preference rows made without a model: `prompt`, `chosen` (the right number), `rejected` (a near miss)."""
    rows = []
    for question in _training(count, seed, operations):
        wrong_by = WRONG_BY[_hash("wrong", seed, *question) % len(WRONG_BY)]
        right = _answer(question)
        rows.append({"prompt": [_user(question)], "chosen": str(right), "rejected": str(right + wrong_by)})
    return rows


def _training(count: int, seed: int, operations: str) -> list[Question]:
    if operations not in ("+", "+-"):
        raise InputError("arithmetic rows", f"operations is {operations!r}", "Use '+' or '+-'.")
    questions = list(_questions(operations))
    _check_count("arithmetic rows", count, len(questions))
    # Sorting by a hash is a shuffle that no version of Python's random module can change.
    questions.sort(key=lambda question: _hash(seed, *question))
    return questions[:count]


def _questions(operations: str) -> Iterator[Question]:
    for a in OPERANDS:
        for b in OPERANDS:
            if not is_heldout(a, b):
                yield a, "+", b
                if "-" in operations and a >= b:
                    yield a, "-", b


def _check_count(where: str, count: int, available: int) -> None:
    if not 1 <= count <= available:
        raise InputError(where, f"count is {count}, there are {available} questions", f"Use 1 to {available}.")


def _answer(question: Question) -> int:
    a, operation, b = question
    return a + b if operation == "+" else a - b


def _user(question: Question) -> dict[str, str]:
    a, operation, b = question
    return {"role": "user", "content": f"What is {a} {operation} {b}? Reply with only the number."}


def _prompt(question: Question) -> dict[str, Any]:
    return {"messages": [_user(question)], "ground_truth": str(_answer(question)), "verifier": VERIFIER}


def _hash(*parts: object) -> int:
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big")
