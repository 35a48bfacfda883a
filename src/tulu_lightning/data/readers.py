"""Rows to typed forms. Every complaint names the file, the row, what was found and what would do."""

from collections.abc import Callable
from typing import Any, NamedTuple

from tulu_lightning.data.chat import Message
from tulu_lightning.data.sources import Row, Source
from tulu_lightning.errors import InputError, nearest

__all__ = ["ROLES", "PreferenceRow", "PromptRow", "read_chat", "read_preference", "read_prompt"]

ROLES = ("system", "user", "assistant")

TokenIds = tuple[int, ...]


class PreferenceRow(NamedTuple):
    """A prompt with a better and a worse answer; token ids, where the row has them, are the record."""

    prompt: list[Message]
    chosen: str
    rejected: str
    ids: tuple[TokenIds, TokenIds, TokenIds] | None = None
    """Prompt, chosen and rejected as the sampler saw and made them. The texts are then empty."""


class PromptRow(NamedTuple):
    """A question for a verifier."""

    messages: list[Message]
    ground_truth: str
    verifier: str


def read_chat(source: Source, number: int, row: Row) -> list[Message]:
    """The messages of an SFT row.

    Raises:
        InputError: `messages` is missing, empty or malformed, or has no assistant turn.
    """
    where = source.row_name(number)
    messages = _messages(where, "messages", _field(where, row, "messages"))
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(where, "messages has no assistant turn to learn from", "Add one, or remove the row.")
    return messages


def read_prompt(source: Source, number: int, row: Row, complaint: Callable[[str, str], str | None]) -> PromptRow:
    """A prompt row.

    Args:
        source: where the row is from.
        number: its number there, from 1.
        row: its fields: `messages` (ending with a user turn), `ground_truth`, `verifier`.
        complaint: why a verifier (by name) cannot use a target, or None; raises InputError for an unknown verifier.

    Raises:
        InputError: a field is missing or malformed, or the verifier cannot use the target.
    """
    where = source.row_name(number)
    messages = _messages(where, "messages", _field(where, row, "messages"))
    if messages[-1]["role"] != "user":
        raise InputError(where, "messages does not end with a user turn", "Leave the answer to the model.")
    target = _text(where, "ground_truth", _field(where, row, "ground_truth"))
    verifier = _text(where, "verifier", _field(where, row, "verifier"))
    try:
        found = complaint(verifier, target)
    except InputError as error:
        raise InputError(where, error.what, error.remedy) from None
    if found:
        raise InputError(where, f"verifier {verifier!r} cannot use ground_truth: {found}", "Correct the target.")
    return PromptRow(messages, target, verifier)


def read_preference(source: Source, number: int, row: Row) -> PreferenceRow:
    """A preference row: `prompt` (text or messages), `chosen` and `rejected` (text or one assistant message).

    Rows with `prompt_ids`, `chosen_ids` and `rejected_ids` are read by these alone.

    Raises:
        InputError: a field is missing or malformed, or only some of the ids are there.
    """
    where = source.row_name(number)
    if any(name in row for name in ("prompt_ids", "chosen_ids", "rejected_ids")):
        prompt, chosen, rejected = (
            _ids(where, name, _field(where, row, name)) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        if not prompt:
            raise InputError(where, "prompt_ids is empty", "Give the prompt's token ids, template included.")
        return PreferenceRow([], "", "", (prompt, chosen, rejected))
    given = _field(where, row, "prompt")
    messages = _messages(where, "prompt", [{"role": "user", "content": given}] if isinstance(given, str) else given)
    if messages[-1]["role"] == "assistant":
        raise InputError(where, "prompt ends with an assistant turn", "Put the answers in chosen and rejected.")
    chosen, rejected = (_answer(where, name, _field(where, row, name)) for name in ("chosen", "rejected"))
    return PreferenceRow(messages, chosen, rejected)


def _field(where: str, row: Row, name: str) -> Any:
    if name not in row:
        raise InputError(where, f"the row has no field {name!r} (it has {', '.join(row) or 'none'})", f"Add {name!r}.")
    return row[name]


def _text(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(where, f"{name} is {_shown(value)}, not text", "Write it as a string.")
    return value


def _messages(where: str, name: str, value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        remedy = 'Give at least one {"role": ..., "content": ...}.'
        raise InputError(where, f"{name} is {_shown(value)}, not a list of messages", remedy)
    return [_message(where, f"{name}[{index}]", message) for index, message in enumerate(value)]


def _message(where: str, name: str, message: Any) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise InputError(where, f"{name} is {_shown(message)}", 'Give it as {"role": ..., "content": ...}.')
    role = message["role"]
    if role not in ROLES:
        raise InputError(where, f"{name} has the role {role!r}, which does not exist", nearest(str(role), ROLES))
    return {"role": role, "content": _text(where, f"content of {name}", message["content"])}


def _answer(where: str, name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    messages = _messages(where, name, value)
    if [message["role"] for message in messages] != ["assistant"]:
        raise InputError(where, f"{name} is not one assistant message", "Move the turns before it to prompt.")
    return messages[0]["content"]


def _ids(where: str, name: str, value: Any) -> TokenIds:
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise InputError(where, f"{name} is {_shown(value)}, not a list of token ids", "Give whole numbers from 0.")
    return tuple(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
