"""SFT rows of any common format to messages; what they come out as is checked like a row that had messages."""

from collections.abc import Callable, Mapping
from typing import Any

from tulu_lightning.data.chat import Message
from tulu_lightning.data.importing import find_function
from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.readers import field, messages_of, read_chat, shown, text_of
from tulu_lightning.data.sources import READER_EXAMPLE, Row, Source
from tulu_lightning.errors import InputError, nearest

__all__ = ["own_row", "sharegpt_turn", "sharegpt_turns", "to_messages"]

SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "ai"), "assistant"),
    "system": "system",
}
"""What ShareGPT-like sets write in `from`."""


def to_messages(source: Source, number: int, row: Row) -> list[Message]:
    """The messages of an SFT row, by the source's `read`.

    A row of plain text comes out as one message of the role `text`, which is written without headers: BOS, if the template
    has one, the text, and the token that ends an answer.

    Args:
        source: where the row is from.
        number: its number there, from 1.
        row: its fields, `columns` applied.

    Raises:
        InputError: a field is missing or malformed, a role is unknown, nothing is there to learn from, or the user's
            own reader fails.
        LeftOut: the user's own reader returned None.
    """
    if source.read == "messages":
        return read_chat(source, number, row)
    where = source.row_name(number)
    if source.read == "text":
        return [{"role": "text", "content": text_of(where, "text", field(where, row, "text"))}]
    if source.read in READERS:
        made: Any = {"messages": READERS[source.read](where, row)}
    else:
        made = own_row(where, source.read, row, "messages")
    return read_chat(source, number, made)


def sharegpt_turns(where: str, row: Row) -> list[Message]:
    """The messages of `conversations`, a list of {from, value}; `system` may stand beside it.

    Raises:
        InputError: it is missing or malformed, or somebody unknown speaks.
    """
    turns = field(where, row, "conversations")
    if not isinstance(turns, list) or not turns:
        remedy = 'Give at least one {"from": ..., "value": ...}.'
        raise InputError(where, f"conversations is {shown(turns)}, not a list of turns", remedy)
    return [*_system(where, row), *(sharegpt_turn(where, f"conversations[{i}]", turn) for i, turn in enumerate(turns))]


def sharegpt_turn(where: str, name: str, turn: Any) -> Message:
    """The message of one {from, value}, which errors call `name`.

    Raises:
        InputError: it is malformed, or somebody unknown speaks.
    """
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise InputError(where, f"{name} is {shown(turn)}", 'Give it as {"from": ..., "value": ...}.')
    speaker = turn["from"]
    role = SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        remedy = f"{nearest(str(speaker), SPEAKERS)} Or leave such rows out with a reader of your own (read)."
        raise InputError(where, f"{name} is from {speaker!r}, which does not exist", remedy)
    own = {key: turn[key] for key in ("weight", "loss_weight", "train") if key in turn}
    return {"role": role, "content": text_of(where, f"value of {name}", turn["value"]), **own}


def _alpaca(where: str, row: Row) -> list[Message]:
    """`instruction`, `input` (may be empty or missing) and `output`; `system` and `history` if they are there."""
    question = text_of(where, "instruction", field(where, row, "instruction"))
    if more := text_of(where, "input", row.get("input", "")):
        question = f"{question}\n\n{more}"
    history = row.get("history", [])
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise InputError(where, f"history is {shown(history)}", "Give a list of [question, answer] pairs.")
    pairs = [*history, [question, text_of(where, "output", field(where, row, "output"))]]
    turns = [(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [
        *_system(where, row),
        *({"role": role, "content": text_of(where, "a part of history", text)} for role, text in turns),
    ]


def _prompt_completion(where: str, row: Row) -> list[Message]:
    """`prompt` and `completion`, each text (one turn) or messages; what the assistant says in the prompt is context."""
    prompt, completion = field(where, row, "prompt"), field(where, row, "completion")
    asked = _messages(where, "prompt", prompt, "user")
    told = _messages(where, "completion", completion, "assistant")
    if odd := next((message["role"] for message in told if message["role"] != "assistant"), None):
        raise InputError(where, f"completion has a message of the {odd}", "Move the turns before the answer to prompt.")
    context = {"weight": 0.0}
    return [*({**m, **context} if m["role"] == "assistant" else m for m in asked), *told]


def _messages(where: str, name: str, value: Any, role: str) -> list[Message]:
    return messages_of(where, name, [{"role": role, "content": value}] if isinstance(value, str) else value)


def _system(where: str, row: Row) -> list[Message]:
    text = text_of(where, "system", row.get("system", ""))
    return [{"role": "system", "content": text}] if text.strip() else []


def own_row(where: str, import_path: str, row: Row, fields: str) -> Mapping[str, Any]:
    """What the user's own reader makes of a row.

    Args:
        where: names the row.
        import_path: of the reader.
        row: the row as it is.
        fields: what the result must have, for the error.

    Raises:
        InputError: the reader cannot be found, fails, or returns something else than a row.
        LeftOut: it returned None.
    """
    reader = find_function(where, import_path, READER_EXAMPLE)
    try:
        made = reader(row)
    except (InputError, LeftOut):
        raise
    except Exception as error:
        what = f"{import_path} fails on it ({type(error).__name__}: {error})"
        raise InputError(where, what, "Correct the reader, or return None to leave the row out.") from error
    if made is None:
        raise LeftOut("by its reader")
    if not isinstance(made, dict):
        remedy = f"It must return a row with {fields}, or None to leave the row out."
        raise InputError(where, f"{import_path} returned a {type(made).__name__}", remedy)
    return made


READERS: dict[str, Callable[[str, Row], list[Message]]] = {
    "sharegpt": sharegpt_turns,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}
"""Readers of the formats that are turned into messages."""
