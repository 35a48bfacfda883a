"""Preference rows of any common format to their two conversations."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tulu_lightning.data.chat import Message
from tulu_lightning.data.formats import own_row, sharegpt_turn, sharegpt_turns
from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.readers import field, messages_of, shown, text_of
from tulu_lightning.data.sources import Row, Source
from tulu_lightning.errors import InputError

__all__ = ["IdPair", "Pair", "to_pair"]

SIDES = ("chosen", "rejected")
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
EQUAL, EMPTY, TIE = "with equal answers", "with an empty answer", "with a tie"
REVERSED = "whose rejected answer has the higher score"
"""Reasons for which a pair is left out."""


class Pair(NamedTuple):
    """Two whole conversations that begin with the same system and user messages and each end with an answer."""

    chosen: list[Message]
    rejected: list[Message]


class IdPair(NamedTuple):
    """A pair as token ids, as the sampler saw and made them."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    texts: Pair | None = None
    """What the row says in words beside the ids, where a filter wants to read it."""


def to_pair(source: Source, number: int, row: Row) -> Pair | IdPair:
    """The pair of a row, by the source's `read`.

    A row with `prompt_ids`, `chosen_ids` and `rejected_ids` is read by these alone, whatever texts are beside them.

    Args:
        source: where the row is from.
        number: its number there, from 1.
        row: its fields, `columns` applied.

    Raises:
        InputError: a field is missing or malformed, the sides do not begin with the same messages, or the user's own
            reader fails.
        LeftOut: an answer is empty, both sides are equal, their scores are a tie or say the opposite, or the user's own
            reader says so.
    """
    where = source.row_name(number)
    if "." in source.read:
        row = dict(own_row(where, source.read, row, "chosen and rejected"))
    elif source.read != "messages":
        row = READERS[source.read](where, row)
    ids = any(name in row for name in IDS)
    pair = _id_pair(where, row, with_texts=bool(source.filters)) if ids else _pair(where, row)
    _compare_scores(where, row)
    return pair


# Conversations ----------------------------------------------------------------------------------------------------


def _pair(where: str, row: Row) -> Pair:
    given = [field(where, row, side) for side in SIDES]
    whole = [_is_whole(value) for value in given]
    if whole[0] != whole[1]:
        what = f"{SIDES[not whole[0]]} is a whole conversation and {SIDES[whole[0]]} is an answer alone"
        raise InputError(where, what, "Give both in the same way.")
    if whole[0]:
        sides = [_turns(where, side, value) for side, value in zip(SIDES, given, strict=True)]
        if isinstance(row.get("prompt"), list):
            _check_prompt(where, _turns(where, "prompt", row["prompt"]), sides)
    else:
        prompt = _prompt(where, row)
        sides = [[*prompt, *_answer(where, side, value)] for side, value in zip(SIDES, given, strict=True)]
    for side, messages in zip(SIDES, sides, strict=True):
        if (role := messages[-1]["role"]) != "assistant":
            raise InputError(where, f"{side} ends with a {role} turn", "Let it end with the answer that was judged.")
    pair = Pair(*sides)
    _check_openings(where, pair)
    _leave_out(pair)
    return pair


def _is_whole(value: Any) -> bool:
    """Whether a side brings its prompt along: a list of messages that does not begin with an answer."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and first.get("role") != "assistant"


def _prompt(where: str, row: Row) -> list[Message]:
    """The prompt as messages; what the assistant says in it is context."""
    given = field(where, row, "prompt")
    messages = _turns(where, "prompt", [{"role": "user", "content": given}] if isinstance(given, str) else given)
    if messages[-1]["role"] == "assistant":
        raise InputError(where, "prompt ends with an assistant turn", "Put the answers in chosen and rejected.")
    return [{**message, "weight": 0.0} if message["role"] == "assistant" else message for message in messages]


def _answer(where: str, side: str, value: Any) -> list[Message]:
    if isinstance(value, str):
        value = [{"role": "assistant", "content": text_of(where, side, value)}]
    return _turns(where, side, value)


def _turns(where: str, name: str, value: Any) -> list[Message]:
    """Messages whose weights are 0 or 1."""
    messages = messages_of(where, name, value)
    for index, message in enumerate(messages):
        if (weight := message.get("weight", 1.0)) not in (0.0, 1.0):
            what = f"{name}[{index}] has the weight {weight:g}, and an answer of a pair counts in full or not at all"
            raise InputError(where, what, "Use 1, or 0 for context.")
    return messages


def _check_prompt(where: str, prompt: Sequence[Message], sides: Sequence[Sequence[Message]]) -> None:
    for side, messages in zip(SIDES, sides, strict=True):
        if found := _first_difference(prompt, messages[: len(prompt)]):
            index, ours, theirs = found
            what = f"prompt is not what {side} begins with: message {index} is {ours} in prompt and {theirs} in {side}"
            raise InputError(where, what, "Leave prompt out, or correct it: the conversations bring their own.")


def _check_openings(where: str, pair: Pair) -> None:
    openings = []
    for messages in pair:
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        openings.append(messages[: answers[0]])
    if found := _first_difference(*openings):
        index, chosen, rejected = found
        what = f"the prompts differ between the two sides: message {index} is {chosen} in chosen and {rejected} in rejected"
        remedy = "Give both sides the same system and user messages before the first answer, or leave the row out."
        raise InputError(where, what, remedy)


def _first_difference(one: Sequence[Message], other: Sequence[Message]) -> tuple[int, str, str] | None:
    """Number (from 1) of the first message that is not the same in both, and both of them, shortened."""
    for index in range(max(len(one), len(other))):
        a, b = (messages[index] if index < len(messages) else None for messages in (one, other))
        if a is None or b is None or (a["role"], a["content"]) != (b["role"], b["content"]):
            texts = [message["content"] if message else "" for message in (a, b)]
            same = next((at for at, (x, y) in enumerate(zip(*texts, strict=False)) if x != y), min(map(len, texts)))
            start = max(0, same - 20)  # or a long text would be cut before it differs
            said = [f"{m['role']} {shown('...' * bool(start) + m['content'][start:])}" if m else "none" for m in (a, b)]
            return index + 1, said[0], said[1]
    return None


def _leave_out(pair: Pair) -> None:
    if any(not messages[-1]["content"].strip() for messages in pair):
        raise LeftOut(EMPTY)
    chosen, rejected = ([(message["role"], message["content"]) for message in messages] for messages in pair)
    if chosen == rejected:
        raise LeftOut(EQUAL)


def _compare_scores(where: str, row: Row) -> None:
    """Leave a pair out whose sides have scores (`score_chosen`, `score_rejected`) that do not say what it says."""
    given = {name: row[name] for name in ("score_chosen", "score_rejected") if name in row}
    for name, value in given.items():
        if not _is_score(value):
            raise InputError(
                where, f"{name} is {shown(value)}, not a number", "Give a number, or leave the scores out."
            )
    if len(given) == 2 and given["score_chosen"] <= given["score_rejected"]:
        raise LeftOut(TIE if given["score_chosen"] == given["score_rejected"] else REVERSED)


# Token ids --------------------------------------------------------------------------------------------------------


def _id_pair(where: str, row: Row, with_texts: bool) -> IdPair:
    prompt, chosen, rejected = (_ids(where, name, field(where, row, name)) for name in IDS)
    if not prompt:
        raise InputError(where, "prompt_ids is empty", "Give the prompt's token ids, template included.")
    if not chosen or not rejected:
        raise LeftOut(EMPTY)
    texts = _pair(where, {name: value for name, value in row.items() if name not in IDS}) if with_texts else None
    return IdPair(prompt, chosen, rejected, texts)


def _ids(where: str, name: str, value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise InputError(where, f"{name} is {shown(value)}, not a list of token ids", "Give whole numbers from 0.")
    return value


# Other formats ----------------------------------------------------------------------------------------------------


def _sharegpt(where: str, row: Row) -> Row:
    """`conversations` that end with a question, and `chosen` and `rejected`, each {from, value} or a list of them."""
    made: Row = {**row, "prompt": sharegpt_turns(where, row)}
    for side in SIDES:
        given = field(where, row, side)
        turns = given if isinstance(given, list) and given else [given]
        made[side] = [sharegpt_turn(where, side, turn) for turn in turns]
    return made


def _ultrafeedback(where: str, row: Row) -> Row:
    """`instruction` and `completions`, each with a `response` and its scores.

    The chosen one has the highest score, the rejected one is drawn from those with a lower score, by a hash of the row
    (Tülu 3, section 5.2: the highest mean, and one of the lower ones). A completion without score or text is passed over.
    """
    question, given = (field(where, row, name) for name in ("instruction", "completions"))
    if not isinstance(given, list) or not given:
        remedy = 'Give at least two {"response": ..., "overall_score": ...}.'
        raise InputError(where, f"completions is {shown(given)}, not a list of completions", remedy)
    responses = [_response(where, f"completions[{index}]", completion) for index, completion in enumerate(given)]
    scores: list[Any] = [completion.get("overall_score") for completion in given]
    if not all(map(_is_score, scores)):
        scores = [_mean_rating(completion.get("annotations")) for completion in given]
    scored = [(score, text) for score, text in zip(scores, responses, strict=True) if _is_score(score) and text.strip()]
    if len(scored) < 2:
        raise LeftOut("with fewer than two scored answers")
    best, chosen = max(scored, key=lambda each: each[0])
    lower = [text for score, text in scored if score < best]
    if not lower:
        raise LeftOut(TIE)
    content = json.dumps([question, responses]).encode()
    drawn = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") % len(lower)
    return {"prompt": text_of(where, "instruction", question), "chosen": chosen, "rejected": lower[drawn]}


def _response(where: str, name: str, completion: Any) -> str:
    if not isinstance(completion, dict) or "response" not in completion:
        raise InputError(where, f"{name} is {shown(completion)}", 'Give it as {"response": ..., "overall_score": ...}.')
    return text_of(where, f"response of {name}", completion["response"])


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mean_rating(annotations: Any) -> float | None:
    """Mean over the aspects that have a rating; some have none ("N/A")."""
    aspects = annotations.values() if isinstance(annotations, dict) else []
    ratings = [str(aspect.get("Rating")) for aspect in aspects if isinstance(aspect, dict)]
    numbers = [float(rating) for rating in ratings if rating.replace(".", "", 1).isdecimal()]
    return sum(numbers) / len(numbers) if numbers else None


READERS: dict[str, Callable[[str, Row], Row]] = {"sharegpt": _sharegpt, "ultrafeedback": _ultrafeedback}
"""Readers of the formats that are turned into `prompt`, `chosen` and `rejected`."""
