"""IFEval's constraints in words of our own, with arguments drawn for them: what a training prompt is given.

The wording is not the benchmark's, so what is learned from it is not the benchmark's phrases.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

__all__ = ["DRAWS", "Constraint", "Dice", "clash", "ground_truth"]

T = TypeVar("T")

KEYWORDS = (
    *("anchor", "autumn", "balance", "basket", "bridge", "candle", "castle", "circle", "copper", "corner", "engine"),
    *("feather", "forest", "garden", "hammer", "harbor", "island", "kitchen", "ladder", "lantern", "marble", "market"),
    *("meadow", "mirror", "morning", "mountain", "ocean", "orange", "paper", "pencil", "pocket", "rabbit", "ribbon"),
    *("river", "saddle", "shadow", "silver", "summer", "thread", "tunnel", "valley", "velvet", "winter", "window"),
)
COMMON = ("and", "also", "because", "can", "good", "have", "important", "is", "many", "more", "people", "that", "very")
"""Words that a response is likely to hold, for those that it must do without."""
ENDINGS = ("That is all.", "I hope this helps.", "The end.", "Any questions?", "Thank you for reading.")
LANGUAGES = {"de": "German", "es": "Spanish", "fr": "French", "it": "Italian", "pt": "Portuguese", "ru": "Russian"}
RELATIONS = {"at least": "at least", "less than": "fewer than"}


class Constraint(NamedTuple):
    """One constraint that was drawn."""

    id: str
    """IFEval's instruction id."""
    arguments: dict[str, Any]
    text: str
    """What the prompt says, a whole sentence."""


class Dice:
    """Draws that no version of Python can change: each is a hash of the seed and of how many came before.

    Args:
        seed: anything whose text tells one stream from another.
    """

    def __init__(self, *seed: object) -> None:
        self._seed, self._drawn = " ".join(map(str, seed)), 0

    def below(self, limit: int) -> int:
        """A whole number from 0 to `limit` - 1."""
        self._drawn += 1
        digest = hashlib.sha256(f"{self._seed} {self._drawn}".encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") % limit

    def pick(self, choices: Sequence[T]) -> T:
        """One of the choices."""
        return choices[self.below(len(choices))]

    def some(self, choices: Sequence[T], count: int) -> list[T]:
        """So many different ones."""
        left = list(choices)
        return [left.pop(self.below(len(left))) for _ in range(count)]


Draw = Callable[[Dice, str], tuple[dict[str, Any], str]]
"""Takes the prompt's own text; returns arguments and wording."""


def _relation(dice: Dice) -> tuple[str, str]:
    relation = dice.pick(tuple(RELATIONS))
    return relation, RELATIONS[relation]


def _keywords(dice: Dice, prompt: str) -> tuple[dict[str, Any], str]:
    words = sorted(dice.some(KEYWORDS, 1 + dice.below(2)))
    return {"keywords": words}, f"Use the word{'s' if words[1:] else ''} {' and '.join(words)} in your answer."


def _keyword_frequency(dice: Dice, prompt: str) -> tuple[dict[str, Any], str]:
    word, count, (relation, said) = dice.pick(KEYWORDS), 2 + dice.below(3), _relation(dice)
    return (
        {"keyword": word, "frequency": count, "relation": relation},
        f"Let the word {word} occur {said} {count} times.",
    )


def _forbidden_words(dice: Dice, prompt: str) -> tuple[dict[str, Any], str]:
    words = sorted(dice.some(COMMON, 1 + dice.below(2)))
    return {"forbidden_words": words}, f"Do without the word{'s' if words[1:] else ''} {' and '.join(words)}."


def _letter_frequency(dice: Dice, prompt: str) -> tuple[dict[str, Any], str]:
    letter, (relation, said) = dice.pick("abcdefghiklmnoprstuvwy"), _relation(dice)
    count = 2 + dice.below(6)
    arguments = {"letter": letter, "let_frequency": count, "let_relation": relation}
    return arguments, f"The letter {letter} must occur {said} {count} times."


def _language(dice: Dice, prompt: str) -> tuple[dict[str, Any], str]:
    language = dice.pick(tuple(LANGUAGES))
    return {"language": language}, f"Answer in {LANGUAGES[language]} from the first word to the last."


def _sentences(dice: Dice, prompt: str) -> tuple[dict[str, Any], str]:
    count, (relation, said) = 2 + dice.below(5), _relation(dice)
    return {"num_sentences": count, "relation": relation}, f"Your answer must have {said} {count} sentences."


def _paragraphs(dice: Dice, prompt: str) -> tuple[dict[str, Any], str]:
    count = 2 + dice.below(3)
    return {"num_paragraphs": count}, f"Write {count} paragraphs and put a line with *** between each two of them."


def _words(dice: Dice, prompt: str) -> tuple[dict[str, Any], str]:
    count, (relation, said) = 10 * (2 + dice.below(10)), _relation(dice)
    return {"num_words": count, "relation": relation}, f"Use {said} {count} words."


def _first_word(dice: Dice, prompt: str) -> tuple[dict[str, Any], str]:
    count = 2 + dice.below(3)
    place, word = 1 + dice.below(count), dice.pick(KEYWORDS)
    return (
        {"num_paragraphs": count, "nth_paragraph": place, "first_word": word},
        f"Write {count} paragraphs with a blank line between each two of them; "
        f"paragraph {place} must begin with the word {word}.",
    )


def _placeholders(dice: Dice, prompt: str) -> tuple[dict[str, Any], str]:
    count = 1 + dice.below(4)
    s = "s" if count > 1 else ""
    return {"num_placeholders": count}, f"Leave at least {count} placeholder{s} in square brackets, like [date]."


def _postscript(dice: Dice, prompt: str) -> tuple[dict[str, Any], str]:
    marker = dice.pick(("P.S.", "P.P.S"))
    return {"postscript_marker": marker}, f"Close with a postscript that begins with {marker}"


def _bullets(dice: Dice, prompt: str) -> tuple[dict[str, Any], str]:
    count = 2 + dice.below(4)
    return {"num_bullets": count}, f"Give exactly {count} bullet points, each on a line that begins with *."


def _highlights(dice: Dice, prompt: str) -> tuple[dict[str, Any], str]:
    count = 1 + dice.below(3)
    s = "s" if count > 1 else ""
    return {"num_highlights": count}, f"Emphasise at least {count} passage{s} with asterisks, *like this*."


def _sections(dice: Dice, prompt: str) -> tuple[dict[str, Any], str]:
    count, name = 2 + dice.below(3), dice.pick(("Section", "SECTION", "Part"))
    return (
        {"section_spliter": name, "num_sections": count},
        f"Divide your answer into {count} parts headed {name} 1 to {name} {count}.",
    )


def _repeat(dice: Dice, prompt: str) -> tuple[dict[str, Any], str]:
    return {"prompt_to_repeat": prompt}, "Before you answer, write down the request above exactly as it stands."


def _end(dice: Dice, prompt: str) -> tuple[dict[str, Any], str]:
    phrase = dice.pick(ENDINGS)
    return {"end_phrase": phrase}, f"The last words of your answer must be: {phrase}"


def _capital_words(dice: Dice, prompt: str) -> tuple[dict[str, Any], str]:
    count, (relation, said) = 2 + dice.below(4), _relation(dice)
    return (
        {"capital_frequency": count, "capital_relation": relation},
        f"Write {said} {count} words in capital letters only.",
    )


def _said(text: str) -> Draw:
    return lambda dice, prompt: ({}, text)


DRAWS: dict[str, Draw] = {
    "keywords:existence": _keywords,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _said(
        "Reply with one of these, letter for letter: My answer is yes. / My answer is no. / My answer is maybe."
    ),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _said("Your whole output must be valid JSON."),
    "detectable_format:title": _said("Give it a title in double angle brackets, like <<title>>."),
    "combination:two_responses": _said("Answer twice, differently, with a line of six asterisks (******) in between."),
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _end,
    "startend:quotation": _said("Put your whole answer in double quotation marks."),
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _said("Write in English and in capital letters only."),
    "change_case:english_lowercase": _said("Write in English and without any capital letter."),
    "punctuation:no_comma": _said("Do not use any commas."),
}
"""By IFEval's instruction id."""

_WHOLE = frozenset(
    {"detectable_format:json_format", "detectable_format:constrained_response", "combination:repeat_prompt"}
)
"""These settle the whole answer, or where it begins: nothing else is asked beside them."""
_PARTS = frozenset({"shape", "length"})
_GROUPS: dict[str, frozenset[str]] = {  # what each touches; two that touch the same clash
    "language:response_language": frozenset({"language"}),
    "change_case:english_capital": frozenset({"language", "case"}),
    "change_case:english_lowercase": frozenset({"language", "case"}),
    "change_case:capital_word_frequency": frozenset({"case"}),
    "keywords:letter_frequency": frozenset({"language", "letters"}),
    "keywords:existence": frozenset({"language", "letters"}),
    "keywords:frequency": frozenset({"language", "letters"}),
    "keywords:forbidden_words": frozenset({"letters"}),
    "length_constraints:number_sentences": frozenset({"length"}),
    "length_constraints:number_words": frozenset({"length"}),
    "length_constraints:number_paragraphs": _PARTS,
    "length_constraints:nth_paragraph_first_word": _PARTS | {"start", "language"},
    "detectable_format:multiple_sections": _PARTS | {"case", "letters"},
    "detectable_format:number_bullet_lists": _PARTS,
    "detectable_format:number_highlighted_sections": frozenset({"emphasis"}),
    "combination:two_responses": _PARTS | {"emphasis"},
    "startend:quotation": frozenset({"start"}),
    "startend:end_checker": frozenset({"end", "letters", "language"}),
    "detectable_content:postscript": frozenset({"end", "letters"}),
}


def clash(one: str, other: str) -> bool:
    """Whether the two kinds of constraints are the same, or might not both be followed."""
    if one == other or one in _WHOLE or other in _WHOLE:
        return True
    return bool(_GROUPS.get(one, frozenset()) & _GROUPS.get(other, frozenset()))


def ground_truth(prompt: str, constraints: Sequence[Constraint]) -> str:
    """The target of the verifier `ifeval`: JSON with `prompt`, `instruction_id_list` and `kwargs`."""
    row = {
        "prompt": prompt,
        "instruction_id_list": [constraint.id for constraint in constraints],
        "kwargs": [constraint.arguments for constraint in constraints],
    }
    return json.dumps(row, ensure_ascii=False)
