"""Rendered conversations to token ids and loss weights, one at a time or thousands in one call.

Text is cut into runs: where the mask changes, and at every control token. A run of text is tokenised alone, a control
token is looked up. `encode_many` gives the runs of a whole chunk to the Rust tokenizer at once, which works on all cores.
"""

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from tulu_lightning.data.templates import ChatTemplate, Message, Piece
from tulu_lightning.data.words import word_table

__all__ = ["PLAIN", "Encoded", "Train", "encode_many", "encode_pieces", "message_weight", "rendered", "truncate"]

Train = Literal["all", "last"]
"""Which assistant turns are trained: all of them, or only the last one."""

PLAIN = "text"
"""Role of a message that is no turn of a conversation: written without headers."""
CHUNK = 1024  # conversations in one call of the Rust tokenizer: enough for all cores, few enough for memory


class Encoded(NamedTuple):
    """A conversation as the model sees it."""

    ids: list[int]
    weights: list[float]
    """Loss weight of each token; 0 means context only."""
    ends: tuple[int, ...]
    """For each assistant turn, the index behind its end token."""


def message_weight(message: Message) -> float:
    """Loss weight of an assistant message's tokens: its `weight`, or 1."""
    return float(message.get("weight", 1.0))


def rendered(template: ChatTemplate, messages: Sequence[Message], generation_prompt: bool = False) -> tuple[Piece, ...]:
    """The pieces of a conversation; of plain text (one message of the role `text`), it and the end token, all trained.

    Before plain text stands the template's BOS, if it has one: a model that knows one has seen no text without.
    """
    if messages[0]["role"] != PLAIN:
        return template.render(messages, generation_prompt)
    end = Piece(template.end, trained=True, control=True, ends=True)
    bos = (Piece(template.bos, control=True),) if template.bos else ()
    return *bos, Piece(messages[0]["content"], trained=True), end


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
    """Token ids and mask of rendered pieces, run by run: the plain route, for single conversations."""
    ids: list[int] = []
    mask: list[bool] = []
    for run in _runs(pieces):
        found = _ids(tokenizer, run.text, run.control)
        ids += found
        mask += [run.trained] * len(found)
    return ids, mask


def encode_many(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    conversations: Sequence[Sequence[Message]],
    train: Train = "all",
    generation_prompt: bool = False,
) -> list[Encoded]:
    """Token ids and loss weights of many conversations; the ids are those of `chat.encode`.

    Args:
        tokenizer: its settings are as before afterwards. One that is not written in Rust takes the runs one by one.
        template: bound to the tokenizer.
        conversations: at least one message each. An assistant message's `weight` is that of its words and its end
            token.
        train: `last` trains the last assistant turn only.
        generation_prompt: end each with the header of an answer to come.

    Raises:
        InputError: the model's own template refuses a conversation.
    """
    encoded: list[Encoded] = []
    controls: dict[str, list[int]] = {}
    with _restored(tokenizer), _uncollected():
        for at in range(0, len(conversations), CHUNK):
            chunk = conversations[at : at + CHUNK]
            rows = [_runs(rendered(template, messages, generation_prompt)) for messages in chunk]
            runs = [run for row in rows for run in row]
            for text in {run.text for run in runs if run.control} - controls.keys():
                controls[text] = _ids(tokenizer, text, control=True)
            texts = _encode_texts(tokenizer, {run.text for run in runs if not run.control})
            for row, messages in zip(rows, chunk, strict=True):
                encoded.append(_assemble(row, texts, controls, _turn_weights(messages, train)))
    return encoded


def truncate(encoded: Encoded, max_tokens: int) -> Encoded | None:
    """The row within `max_tokens`, ending in the end token of a trained turn; None if that cannot be.

    Whole turns are dropped from the end as long as a trained one is left. If not even the first trained turn fits,
    its words are cut (between two tokens) and its end token stays, so a model still learns to stop; at least one token
    of the words is kept. What stands before an answer is never cut.

    Example: a prompt of 10 tokens, an answer of 5 and its end token, then more. Within 12 tokens: the prompt, one token
    of the answer, the end token. Within 11: None.
    """
    if len(encoded.ids) <= max_tokens:
        return encoded
    trained = [turn for turn, end in enumerate(encoded.ends) if encoded.weights[end - 1] > 0]
    if not trained:
        return None
    fitting = [turn for turn in trained if encoded.ends[turn] <= max_tokens]
    if fitting:
        end = encoded.ends[fitting[-1]]
        return Encoded(encoded.ids[:end], encoded.weights[:end], encoded.ends[: fitting[-1] + 1])
    first = trained[0]
    stop = encoded.ends[first] - 1
    floor = encoded.ends[first - 1] if first else 0
    start = stop
    while start > floor and encoded.weights[start - 1] > 0:
        start -= 1
    if start + 2 > max_tokens:
        return None
    kept = max_tokens - 1
    return Encoded(
        [*encoded.ids[:kept], encoded.ids[stop]],
        [*encoded.weights[:kept], encoded.weights[stop]],
        (*encoded.ends[:first], max_tokens),
    )


def _runs(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces, with neighbouring texts of one mask joined, since a tokenizer may join them too."""
    runs: list[Piece] = []
    last: Piece | None = None
    for piece in pieces:
        if last is not None and not (piece.control or last.control) and piece.trained == last.trained:
            last = runs[-1] = Piece(last.text + piece.text, piece.trained)
        else:
            runs.append(piece)
            last = piece
    return runs


def _turn_weights(messages: Sequence[Message], train: Train) -> list[float]:
    weights = [message_weight(message) for message in messages if message["role"] in ("assistant", PLAIN)]
    return weights if train == "all" else [0.0] * (len(weights) - 1) + weights[-1:]


def _assemble(
    runs: Sequence[Piece], texts: dict[str, list[int]], controls: dict[str, list[int]], turn_weights: list[float]
) -> Encoded:
    ids: list[int] = []
    weights: list[float] = []
    ends: list[int] = []
    turn = 0
    for run in runs:
        found = controls[run.text] if run.control else texts[run.text]
        if not run.trained:
            turn = len(ends)  # what is trained after the next context is the next turn's
        ids += found
        # A template that trains more than there are turns is wrong, and must look wrong to the template doctor.
        weight = (turn_weights[turn] if turn < len(turn_weights) else 1.0) if run.trained else 0.0
        weights += [weight] * len(found)
        if run.ends:
            ends.append(len(ids))
    return Encoded(ids, weights, tuple(ends))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, control: bool) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not control) if text else []


def _encode_texts(tokenizer: PreTrainedTokenizerBase, texts: set[str]) -> dict[str, list[int]]:
    """Ids of texts in which special tokens are ordinary text."""
    found: dict[str, list[int]] = {"": []}
    if not tokenizer.is_fast:
        found.update((text, _ids(tokenizer, text, control=False)) for text in texts - {""})
        return found
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    if (table := word_table(tokenizer)) is not None:
        found.update(table.encode(texts - {""}))
    wanted = sorted(texts - found.keys(), key=len, reverse=True)  # long ones first, so that no core waits at the end
    encodings = backend.encode_batch_fast(wanted, add_special_tokens=False)
    found.update((text, encoding.ids) for text, encoding in zip(wanted, encodings, strict=True))
    return found


@contextmanager
def _restored(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Puts back what is set on a Rust tokenizer meanwhile; transformers' own calls set and leave it too."""
    if not tokenizer.is_fast:
        yield
        return
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    special, truncation, padding = backend.encode_special_tokens, backend.truncation, backend.padding
    try:
        yield
    finally:
        backend.encode_special_tokens = special
        backend.no_truncation()
        backend.no_padding()
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


@contextmanager
def _uncollected() -> Iterator[None]:
    """No search for cycles meanwhile: many lists are made here and no cycle, and a search costs as much as the work."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
