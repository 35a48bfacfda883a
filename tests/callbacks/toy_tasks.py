"""Two small tasks: one that is answered, one whose choices are ranked."""

import json

from tulu_lightning.assets.arithmetic import heldout_rows
from tulu_lightning.evaluation.task import Example, Task, Turn
from tulu_lightning.types import Verdict


class EvenBytes:
    """Right if most bytes of the answer are even: random weights get some right."""

    runs = "here"

    def __call__(self, response, target):
        data = response.encode("utf-8", "surrogatepass")
        right = 2 * sum(byte % 2 == 0 for byte in data) > len(data)
        return Verdict("right" if right else "wrong", float(right))

    def complaint(self, target):
        return None

    def __repr__(self):
        return "EvenBytes()"


class Likeliest(EvenBytes):
    """Right if the target's choice has the highest log-prob."""

    def __call__(self, response, target):
        logps = json.loads(response)
        right = logps.index(max(logps)) == int(target)
        return Verdict("right" if right else "wrong", float(right))

    def __repr__(self):
        return "Likeliest()"


def all_rows():
    """Forty sums."""
    return heldout_rows(40)


def _asked(row, place):
    return Example(f"toy/{place}", (Turn("user", row["messages"][0]["content"]),), row["ground_truth"])


def _ranked(row, place):
    turns = (Turn("user", row["messages"][0]["content"]),)
    return Example(f"ranked/{place}", turns, str(place % 3), group=str(place % 2), choices=("1", "22", "7"))


ASKED = Task(
    name="asked", version=1, skill="Math", rows=all_rows, example=_asked, verifier="even", own=EvenBytes(),
    max_new_tokens=6, temperature=1.0, samples=2,
)  # fmt: skip
RANKED = Task(
    name="ranked", version=2, skill="Math", rows=all_rows, example=_ranked, verifier="likeliest", own=Likeliest(),
    average="macro",
)  # fmt: skip
