"""Short instructions with a constraint that a program can check: an IFEval-style task for a small model.

Each asks for a sentence or a few points on an everyday topic and for one thing about the form that SmolLM2-135M does
sometimes, not always. Which topics are held out is decided by a hash of the topic and nothing else, so no seed,
count or constraint ever shows a held-out topic in training.
"""

import hashlib
from typing import Any

from tulu_lightning.assets.constraints import Constraint, ground_truth
from tulu_lightning.errors import InputError

__all__ = ["TOPICS", "heldout_rows", "is_heldout", "prompt_rows"]

HELDOUT_SHARE = 4  # one topic in so many is held out
TOPICS = (
    *("apples", "bread", "butter", "cheese", "coffee", "eggs", "honey", "lemons", "milk", "pasta", "potatoes", "rice"),
    *("salt", "soup", "sugar", "tea", "ants", "bats", "bears", "bees", "camels", "cats", "chickens", "cows", "crabs"),
    *("dogs", "dolphins", "ducks", "eagles", "elephants", "foxes", "frogs", "goats", "horses", "lions", "mice", "owls"),
    *("penguins", "pigs", "rabbits", "sharks", "sheep", "snakes", "spiders", "tigers", "whales", "wolves", "clouds"),
    *("deserts", "fire", "fog", "forests", "glaciers", "grass", "hail", "islands", "lakes", "lightning", "mountains"),
    *("oceans", "rain", "rainbows", "rivers", "sand", "snow", "stars", "storms", "the moon", "the sun", "trees"),
    *("volcanoes", "waterfalls", "wind", "airports", "bakeries", "bridges", "castles", "farms", "gardens", "hospitals"),
    *("hotels", "kitchens", "libraries", "markets", "museums", "parks", "ports", "schools", "theatres", "tunnels"),
    *("villages", "zoos", "bicycles", "boats", "books", "buses", "cameras", "candles", "chairs", "clocks", "coins"),
    *("doors", "drums", "flags", "glasses", "guitars", "hats", "keys", "kites", "knives", "ladders", "lamps", "maps"),
    *("mirrors", "newspapers", "paper", "pencils", "pianos", "planes", "radios", "ropes", "shoes", "soap", "stamps"),
    *("tables", "telephones", "tents", "toys", "trains", "umbrellas", "wheels", "windows", "chess", "dancing"),
    *("fishing", "football", "painting", "reading", "running", "singing", "sleep", "swimming", "walking", "winter"),
)
SENTENCE, POINTS = "Write one sentence about {}.", "List facts about {}."


def _words(count: int) -> tuple[str, Constraint]:
    arguments = {"num_words": count, "relation": "less than"}
    return SENTENCE, Constraint("length_constraints:number_words", arguments, f"Use fewer than {count} words.")


def _without(word: str) -> tuple[str, Constraint]:
    return SENTENCE, Constraint("keywords:forbidden_words", {"forbidden_words": [word]}, f"Do without the word {word}.")


def _bullets(count: int) -> tuple[str, Constraint]:
    text = f"Give exactly {count} bullet points, each on a line that begins with *."
    return POINTS, Constraint("detectable_format:number_bullet_lists", {"num_bullets": count}, text)


def _plain(kind: str, text: str, **arguments: Any) -> tuple[str, Constraint]:
    return SENTENCE, Constraint(kind, arguments, text)


FORMS = (
    *(_words(count) for count in (8, 10, 12, 14)),
    *(_without(word) for word in ("and", "of", "the")),
    *(_bullets(count) for count in (2, 3)),
    _plain("punctuation:no_comma", "Do not use any commas."),
    _plain("punctuation:no_comma", "Leave out all commas."),
    _plain("detectable_format:title", "Give it a title in double angle brackets, like <<title>>."),
    _plain("startend:end_checker", "The last words of your answer must be: The end.", end_phrase="The end."),
)
"""What is asked of each topic: a request and one constraint."""


def is_heldout(topic: str) -> bool:
    """Whether a topic is kept out of all training rows."""
    return _hash("split", topic) % HELDOUT_SHARE == 0


def prompt_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Training instructions, all different.

    Args:
        count: number of rows.
        seed: decides which rows, and their order.

    Returns:
        Rows with `messages` (user), `ground_truth` and `verifier` (`ifeval`).
    """
    return _rows("instructions.prompt_rows", count, heldout=False, seed=seed)


def heldout_rows(count: int) -> list[dict[str, Any]]:
    """Instructions on held-out topics in a fixed order: 100 of them are the first 100 of 200.

    Returns:
        Rows as `prompt_rows` gives them.
    """
    return _rows("instructions.heldout_rows", count, heldout=True, seed="heldout")


def _rows(where: str, count: int, heldout: bool, seed: object) -> list[dict[str, Any]]:
    topics = [topic for topic in TOPICS if is_heldout(topic) == heldout]
    available = len(topics) * len(FORMS)
    if not 1 <= count <= available:
        raise InputError(where, f"count is {count}, there are {available} instructions", f"Use 1 to {available}.")
    # Sorting by a hash is a shuffle that no version of Python's random module can change.
    asked = [(topic, number) for topic in topics for number in range(len(FORMS))]
    asked.sort(key=lambda pair: _hash("order", seed, *pair))
    return [_row(topic, *FORMS[number]) for topic, number in asked[:count]]


def _row(topic: str, request: str, constraint: Constraint) -> dict[str, Any]:
    prompt = f"{request.format(topic)} {constraint.text}"
    target = ground_truth(prompt, [constraint])
    return {"messages": [{"role": "user", "content": prompt}], "ground_truth": target, "verifier": "ifeval"}


def _hash(*parts: object) -> int:
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big")
