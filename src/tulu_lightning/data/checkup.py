"""The rules of the template doctor, on one encoded row.

A row is cut behind each of its end tokens, and every part is decoded and held against the messages that belong to it.
White space is left out of these comparisons: templates may trim and add it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple
from unicodedata import normalize

from transformers import PreTrainedTokenizerBase

from tulu_lightning.data.encoding import Encoded, encode_many, encode_pieces, message_weight
from tulu_lightning.data.templates import ChatTemplate, Message

__all__ = ["Bos", "Broken", "Checkup"]

Bos = Literal["none", "one"]
Broken = tuple[str, str]
"""Name of a rule that does not hold, and what was found."""


class _Turn(NamedTuple):
    """One assistant turn of an encoded row, or what follows the last one."""

    before: list[Message]
    """System and user messages that stand before it."""
    answer: Message | None
    start: int
    """Index of its first token; that of the messages before it."""
    words: int
    """Index of the first of the trained tokens that run up to its end token."""
    end: int
    """Index behind its end token."""


class Checkup:
    """The rules of `doctor.RULES`, each a generator of what breaks it.

    Args:
        tokenizer: that of the model.
        template: bound to it.
        stops: ids that end generation.
        bos: whether a conversation has one BOS token or none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, stops: frozenset[int], bos: Bos
    ) -> None:
        self.tokenizer, self.template, self.stops, self.bos = tokenizer, template, stops, bos
        special = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.watched = special | self.stops | set(self.tokenizer.all_special_ids)
        self.names = sorted({self._decode([number]) for number in self.watched} - {""}, key=len, reverse=True)

    def row(self, messages: Sequence[Message], row: Encoded) -> list[Broken]:
        """Every rule on one row."""
        found = [*self._bos(row), *self._special(messages, row), *self._text(messages, row)]
        answers = sum(message["role"] == "assistant" for message in messages)
        if len(row.ends) == answers:
            turns = list(_turns(messages, row))
            for turn in turns:
                found += [*self._answer(turn, row), *self._context(turn, row)]
            # A prefix that changes moves the prompts too; one name for one fault.
            found += list(self._prefix(messages, row)) or list(self._prompt(messages, turns, row))
        else:
            what = f"{len(row.ends)} of {answers} assistant turns have an end token: {self._shown(row.ids[-16:])}"
            found.append(("end", what))
        return found

    # Rules ------------------------------------------------------------------------------------------------------

    def _bos(self, row: Encoded) -> Iterator[Broken]:
        token = str(self.template.bos or self.tokenizer.bos_token or "")
        if not token:
            return
        bos = self.tokenizer.convert_tokens_to_ids(token)
        start = self._shown(row.ids[:8])
        if token in {piece.text for piece in self.template.opening if piece.control}:
            if row.ids[:2] == [bos, bos]:  # this BOS opens turns too, so it may come again, but not at once
                yield "bos", f"{token} stands twice at the start: {start}"
            return
        ends = {end - 1 for end in row.ends}  # some tokenizers have one token for BOS and EOS
        places = [at for at, number in enumerate(row.ids) if number == bos and at not in ends]
        if places != ([0] if self.bos == "one" else []):
            wanted = "one, at the start," if self.bos == "one" else "none"
            yield "bos", f"{token} stands {len(places)} times where {wanted} is wanted: {start}"

    def _answer(self, turn: _Turn, row: Encoded) -> Iterator[Broken]:
        if turn.answer is None:
            return
        tail = self._shown(row.ids[turn.start : turn.end][-8:])
        if row.ids[turn.end - 1] not in self.stops:
            stops = ", ".join(repr(self._decode([number])) for number in sorted(self.stops))
            yield "end", f"a turn ends in {tail}, and generation stops on {stops}"
        weight = message_weight(turn.answer)
        if not weight:
            if any(row.weights[turn.words : turn.end]):
                yield "answer", f"{_short(turn.answer['content'])} has the weight 0 and is trained"
            return
        if not row.weights[turn.end - 1] > 0:
            yield "end-trained", f"the last token of {tail} is not trained"
        said = self._decode(row.ids[turn.words : turn.end - 1])
        if not _squash(said).endswith(_squash(turn.answer["content"])):
            yield "answer", f"of {_short(turn.answer['content'])} it trains {_short(said)}"
        elif any(found not in (weight, 0.0) for found in row.weights[turn.words : turn.end]):
            yield "answer", f"not all tokens of {_short(turn.answer['content'])} have the weight {weight:g}"

    def _context(self, turn: _Turn, row: Encoded) -> Iterator[Broken]:
        start = turn.start
        while start < turn.words and row.weights[start] > 0 and not self._decode([row.ids[start]]).strip():
            start += 1  # white space behind an end token, which some models' own spans take in
        trained = [at for at in range(start, turn.words) if row.weights[at] > 0]
        if trained:
            yield "context", f"{self._shown([row.ids[at] for at in trained])} is trained"
            return
        context, whole = (_squash(self._decode(row.ids[turn.start : end])) for end in (turn.words, turn.end))
        for message in turn.before:
            words = _squash(message["content"])
            if words in whole and words not in context:
                yield "context", f"{_short(message['content'])} of the {message['role']} is trained"

    def _prefix(self, messages: Sequence[Message], row: Encoded) -> Iterator[Broken]:
        cuts = [at + 1 for at, message in enumerate(messages) if message["role"] == "assistant"][: len(row.ends)]
        if not cuts or cuts[-1] == len(messages):
            cuts = cuts[:-1]
        shorter = encode_many(self.tokenizer, self.template, [messages[:cut] for cut in cuts])
        for cut, part, end in zip(cuts, shorter, row.ends, strict=False):
            if part.ends[-1:] != (end,) or part.ids[:end] != row.ids[:end]:
                yield "prefix", f"its first {cut} messages alone give {self._differ(part.ids[:end], row.ids[:end])}"
                return

    def _prompt(self, messages: Sequence[Message], turns: Sequence[_Turn], row: Encoded) -> Iterator[Broken]:
        at = 0
        for turn in turns:
            at += len(turn.before)
            if turn.answer is None or not at or turn.answer["content"][:1].isspace():
                return  # leading white space may join the last token of the prompt
            if not turn.before:  # right behind another answer nobody asks for one; Tülu's template leaves a newline out
                at += 1
                continue
            pieces = self.template.render(messages[:at], generation_prompt=True)
            prompt, _ = encode_pieces(self.tokenizer, pieces)
            if prompt != row.ids[: len(prompt)]:
                yield "prompt", f"the prompt gives {self._differ(prompt, row.ids[: len(prompt)])}"
                return
            trained = row.ids[turn.words : len(prompt)] if message_weight(turn.answer) else []
            if self._decode(trained).strip():
                yield "prompt", f"{self._shown(trained)} of the generation prompt is trained"
                return
            at += 1

    def _special(self, messages: Sequence[Message], row: Encoded) -> Iterator[Broken]:
        found = {name for name in self.names for message in messages if name in message["content"]}
        if not found:
            return
        harmless = [{**message, "content": self._without(message["content"])} for message in messages]
        (twin,) = encode_many(self.tokenizer, self.template, [harmless])
        extra = Counter(number for number in row.ids if number in self.watched)
        extra.subtract(number for number in twin.ids if number in self.watched)
        if any(extra.values()):
            wrong = ", ".join(self._decode([number]) for number, count in extra.items() if count)
            where = next(
                message["content"] for message in messages if any(name in message["content"] for name in found)
            )
            yield "special", f"text becomes the token {wrong}: {_short(where)}"

    def _text(self, messages: Sequence[Message], row: Encoded) -> Iterator[Broken]:
        decoded = normalize("NFC", self._decode(row.ids))
        rendered = normalize("NFC", "".join(piece.text for piece in self.template.render(messages)))
        if decoded != rendered:
            at = next((i for i, pair in enumerate(zip(decoded, rendered, strict=False)) if pair[0] != pair[1]), -8)
            yield "text", f"{_short(rendered[max(0, at - 8) :])} comes back as {_short(decoded[max(0, at - 8) :])}"
            return
        whole = _squash(decoded)
        for message in messages:
            if _squash(message["content"]) not in whole:
                yield "text", f"{_short(message['content'])} of the {message['role']} is not in it"
                return

    # Words for people --------------------------------------------------------------------------------------------

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _shown(self, ids: Sequence[int]) -> str:
        return _short(self._decode(ids))

    def _differ(self, part: Sequence[int], whole: Sequence[int]) -> str:
        at = next((i for i, pair in enumerate(zip(part, whole, strict=False)) if pair[0] != pair[1]), 0)
        near = slice(max(0, at - 4), at + 8)
        return f"{self._shown(part[near])} where the whole conversation has {self._shown(whole[near])}"

    def _without(self, text: str) -> str:
        for name in self.names:
            text = text.replace(name, "x")
        return text


def _turns(messages: Sequence[Message], row: Encoded) -> Iterator[_Turn]:
    """The row cut behind each end token, with the messages that belong to each part."""
    before: list[Message] = []
    start = 0
    ends = iter(row.ends)
    for message in messages:
        if message["role"] != "assistant":
            before.append(message)
            continue
        end = next(ends)
        words = max(start, end - 1)
        while words > start and row.weights[words - 1] > 0:
            words -= 1
        yield _Turn(before, message, start, words, end)
        before, start = [], end
    yield _Turn(before, None, start, len(row.ids), len(row.ids))


def _squash(text: str) -> str:
    """The text without white space, which templates may trim or add."""
    return "".join(normalize("NFC", text).split())


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:40]}...{text[-15:]}")
