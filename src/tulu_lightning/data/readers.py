"""Rows to typed forms. Every complaint names the file, the row, what was found and what would do."""

from typing import Any

import numpy as np

from tulu_lightning.data.chat import Message
from tulu_lightning.data.sources import Row, Source
from tulu_lightning.errors import InputError, nearest

__all__ = [
    "ROLES",
    "field",
    "messages_of",
    "read_chat",
    "shown",
    "text_of",
]

ROLES = ("system", "user", "assistant")
LARGEST = float(np.finfo(np.float32).max)
"""Weights are kept in fp32; a larger one would be infinite there, and with it the step's loss."""


def read_chat(source: Source, number: int, row: Row) -> list[Message]:
    """The messages of an SFT row.

    An assistant message keeps its `weight`, if it has one.

    Raises:
        InputError: `messages` is missing, empty or malformed, has no assistant turn, or a weight that is not a number
            from 0, or one on a message that is never trained.
    """
    where = source.row_name(number)
    messages = messages_of(where, "messages", field(where, row, "messages"))
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(where, "messages has no assistant turn to learn from", "Add one, or remove the row.")
    return messages


def field(where: str, row: Row, name: str) -> Any:
    """A field that the row must have."""
    if name not in row:
        raise InputError(where, f"the row has no field {name!r} (it has {', '.join(row) or 'none'})", f"Add {name!r}.")
    return row[name]


def text_of(where: str, name: str, value: Any) -> str:
    """A value that must be text."""
    if not isinstance(value, str):
        raise InputError(where, f"{name} is {shown(value)}, not text", "Write it as a string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        what = f"{name} has half of a surrogate pair at character {error.start}, which no tokenizer can read"
        raise InputError(where, what, "Remove or repair that character.") from None
    return value


def messages_of(where: str, name: str, value: Any) -> list[Message]:
    """A value that must be a list of messages."""
    if not isinstance(value, list) or not value:
        remedy = 'Give at least one {"role": ..., "content": ...}.'
        raise InputError(where, f"{name} is {shown(value)}, not a list of messages", remedy)
    return [_message(where, f"{name}[{index}]", message) for index, message in enumerate(value)]


def _message(where: str, name: str, message: Any) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise InputError(where, f"{name} is {shown(message)}", 'Give it as {"role": ..., "content": ...}.')
    role = message["role"]
    if role not in ROLES:
        raise InputError(where, f"{name} has the role {role!r}, which does not exist", nearest(str(role), ROLES))
    read = {"role": role, "content": _content(where, f"content of {name}", message["content"])}
    weight = _weight(where, name, message)
    if role == "assistant":
        return read if weight is None else {**read, "weight": weight}
    if weight:
        what = f"{name} has the weight {weight:g}, and only assistant turns are trained"
        raise InputError(where, what, f"Leave the weight of the {role}'s message out, or set it to 0.")
    return read


def _content(where: str, name: str, value: Any) -> str:
    """Text, or a list of text parts ({"type": "text", "text": ...}; some data sets write `value`), which are joined."""
    if not isinstance(value, list) or not value:
        return text_of(where, name, value)
    parts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise InputError(where, f"{name} has the part {shown(part)}", "Only text can be trained on.")
        parts.append(text_of(where, f"a part of {name}", part.get("text", part.get("value"))))
    return "".join(parts)


def _weight(where: str, name: str, message: dict[str, Any]) -> float | None:
    """`weight` of a message (`loss_weight` in other projects' data), or 0 for `train: false`; None if not given."""
    given = {key: message[key] for key in ("weight", "loss_weight", "train") if message.get(key) is not None}
    train = given.pop("train", True)
    if not isinstance(train, bool):
        raise InputError(where, f"train of {name} is {shown(train)}", "Use true or false.")
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST:
            remedy = "Use a number from 0 that fp32 can hold; 0 is not trained."
            raise InputError(where, f"{key} of {name} is {shown(value)}", remedy)
    weights = {float(value) for value in given.values()}
    if len(weights) > 1 or (not train and any(weights)):
        found = {**given, "train": train} if not train else given
        raise InputError(where, f"{name} has weights that clash: {found}", "Give one of them.")
    return weights.pop() if weights else (None if train else 0.0)


def shown(value: Any) -> str:
    """A value as an error shows it, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
