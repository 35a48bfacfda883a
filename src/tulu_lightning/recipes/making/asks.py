"""The prompts that responses are made to: any rows with a conversation, with or without what verifies an answer."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tulu_lightning.data.chat import Message
from tulu_lightning.data.formats import own_row, to_messages
from tulu_lightning.data.intake import LeftOut, check_names
from tulu_lightning.data.mixture import order, wanted
from tulu_lightning.data.prompt_formats import ROUTES, Rules, read_prompt
from tulu_lightning.data.prompt_source import PromptSource, exemplars_of
from tulu_lightning.data.readers import field, messages_of
from tulu_lightning.data.sources import PROMPT_FORMATS, SFT_FORMATS, Row, check_format, open_source
from tulu_lightning.errors import InputError
from tulu_lightning.types import Check
from tulu_lightning.verifiers.registry import Verifier, Verifiers

__all__ = ["Ask", "Asks", "own_verifiers", "prompt_key", "read_asks"]

FORMATS = tuple(dict.fromkeys((*PROMPT_FORMATS, *(name for name in SFT_FORMATS if name != "text"))))


class Ask(NamedTuple):
    """One prompt."""

    key: str
    """Hash of the messages."""
    messages: list[Message]
    checks: tuple[Check, ...]
    """What verifies an answer; empty where the row says nothing of it."""
    source: str
    columns: dict[str, Any]
    """What else the row holds and a later command may want."""
    question: str
    """Hash of the messages without exemplars: the same question behind other ones has the same."""


class Asks(NamedTuple):
    """Prompts without repetition, and what was left out on the way."""

    kept: list[Ask]
    repeated: int
    """Rows whose prompt had been there before."""
    left_out: int
    """Rows that a filter or a reader left out, or that hold no user turn."""


def prompt_key(messages: Sequence[Message]) -> str:
    """What a prompt is called: a hash of roles and texts, the same on every machine."""
    plain = [[message["role"], message["content"]] for message in messages]
    return hashlib.sha256(json.dumps(plain, ensure_ascii=True).encode()).hexdigest()[:16]


def read_asks(
    sources: Sequence[PromptSource], seed: int = 0, limit: int | None = None, verifiers: Verifiers | None = None
) -> Asks:
    """Read prompts.

    A row of SFT counts as its prompt: what the assistant says last is left away. `fraction`, `count`, `cap`, `limit`
    and filters of a source hold as for training; `upsample` does not.

    Args:
        sources: with `read` of prompts (messages, gsm8k, math) or of SFT, or a reader of yours.
        seed: of what is drawn.
        limit: stop after so many prompts.
        verifiers: the run's.

    Raises:
        InputError: as of `data.sources.open_source`; a row is malformed; upsample is set; no prompt is left.
    """
    check_names(sources, "sources")
    known = verifiers or Verifiers()
    kept: dict[str, Ask] = {}
    repeated = left_out = 0
    for source in sources:
        check_format(source, FORMATS, "prompts")
        if source.upsample != 1:
            remedy = "Leave it out, and set how many responses each prompt gets."
            raise InputError(f"source {source.name!r}", f"upsample is {source.upsample:g}", remedy)
        rules = Rules(known, ROUTES, {source.name: exemplars_of(source)})
        table = open_source(source)
        enough, taken = wanted(source, len(table)), 0
        for index in order(source, len(table), seed):
            if taken == enough or len(kept) == limit:
                break
            ask = _ask(source, table.number(index), table.take([index])[0], rules)
            if ask is None:
                left_out += 1
            elif ask.key in kept:
                repeated += 1
            else:
                kept[ask.key] = ask
                taken += 1
    if not kept:
        raise InputError("sources", f"no prompt is left ({left_out} rows left out)", "Check filters and formats.")
    return Asks(list(kept.values()), repeated, left_out)


def _ask(source: PromptSource, number: int, row: Row, rules: Rules) -> Ask | None:
    """The prompt of a row; None if it is left out."""
    try:
        if _verifiable(source, row):
            read = read_prompt(source, number, row, rules)
            messages, checks = read.messages, read.checks
        else:
            messages, checks = _conversation(source, number, row), ()
    except LeftOut:
        return None
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        return None
    plain: list[Message] = [{"role": m["role"], "content": m["content"]} for m in messages]
    columns = {name: row[name] for name in ("id", "constraints", "original") if row.get(name) is not None}
    whole = prompt_key(plain)
    if not checks or source.few_shot is None:
        return Ask(whole, plain, checks, source.name, columns, whole)
    bare = read_prompt(replace(source, few_shot=None), number, row, rules).messages
    return Ask(whole, plain, checks, source.name, columns, prompt_key(bare))


def _conversation(source: PromptSource, number: int, row: Row) -> list[Message]:
    """The messages of a row; an answer may be among them or not."""
    where = source.row_name(number)
    if source.read == "messages":
        return messages_of(where, "messages", field(where, row, "messages"))
    if "." in source.read:
        made = own_row(where, source.read, row, "messages")
        return messages_of(where, "messages", field(where, dict(made), "messages"))
    return to_messages(source, number, row)


def _verifiable(source: PromptSource, row: Row) -> bool:
    """Whether the row brings a target, or its reader makes one."""
    named = any(row.get(name) is not None for name in ("ground_truth", "checks"))
    return source.read in ("gsm8k", "math") or source.verifier is not None or named


def own_verifiers(given: dict[str, Verifier] | None) -> Verifiers:
    """The package's verifiers and a config's own."""
    return Verifiers(dict(given or {}))
