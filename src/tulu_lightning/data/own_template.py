"""The model's own chat template (Jinja), with the mask from its `{% generation %}` spans.

transformers renders the text and says where the spans lie, in characters. The text is then cut at the spans and at the
template's special tokens, and tokenised piece by piece: nothing is searched for among the tokens. Special tokens that
stand in a message are swapped for place holders while Jinja runs, so they cannot be taken for the template's own.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from tulu_lightning.data.templates import ChatTemplate, Message, Piece
from tulu_lightning.errors import InputError

__all__ = ["JinjaTemplate", "own_template"]

WHERE = "template 'model'"
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
REMEDY = (
    "Put {% generation %} before what the assistant says and {% endgeneration %} after its end token, in the model "
    "folder's chat_template.jinja, or use one of our templates (tulu, llama3, chatml, smollm2)."
)
PRIVATE_USE = range(0xE000, 0xF900)
Special = tuple[str, bool, bool]
"""Text of a special token, and whether it swallows the white space to its left and right."""


@dataclass(frozen=True, kw_only=True)
class JinjaTemplate(ChatTemplate):
    """A Jinja template with generation spans, one for each assistant turn."""

    variables: Mapping[str, str]
    """The tokenizer's named tokens, such as `eos_token`, which the template may use."""
    specials: tuple[Special, ...]

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> tuple[Piece, ...]:
        """As in `ChatTemplate`.

        White space that the tokenizer drops beside a special token is left out.

        Raises:
            InputError: the template refuses the conversation, or has not one generation span for each assistant turn.
        """
        guard = _Guard(self._in_messages, messages)
        text, spans = self._jinja(guard.messages, generation_prompt)
        turns = sum(message["role"] == "assistant" for message in messages)
        if len(spans) != turns:
            what = f"it marks {len(spans)} generation spans for {turns} assistant turns ({_excerpt(messages)})"
            raise InputError(WHERE, what, REMEDY)
        pieces = [piece._replace(text=guard.restore(piece.text)) for piece in self._cut(text, spans)]
        return tuple(pieces)

    def answer(self, text: str) -> tuple[Piece, ...]:
        """As in `ChatTemplate`.

        Raises:
            InputError: the template's generation prompt is not what stands before an answer.
        """
        question: Message = {"role": "user", "content": "?"}
        prompt = _join(self.render([question], generation_prompt=True))
        pieces = self.render([question, {"role": "assistant", "content": text}])
        if not _join(pieces).startswith(prompt):
            what = "its generation prompt is not what stands before an answer"
            raise InputError(WHERE, what, "Correct the template: both must be the same text.")
        said = [piece._replace(trained=True) for piece in _after(len(prompt), pieces)]
        return tuple(said[: 1 + next(index for index, piece in enumerate(said) if piece.ends)])

    @cached_property
    def _in_messages(self) -> re.Pattern[str]:
        return re.compile(_either(text for text, _, _ in self.specials))

    @cached_property
    def _controls(self) -> re.Pattern[str]:
        """One group for each way to swallow white space."""
        parts = []
        for left, right in sorted({special[1:] for special in self.specials}):
            words = _either(text for text, *flags in self.specials if flags == [left, right])
            parts.append((r"\s*" if left else "") + f"({words})" + (r"\s*" if right else ""))
        return re.compile("|".join(parts) or r"(?!)")

    def _jinja(self, messages: Sequence[Message], generation_prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        render: Any = render_jinja_template  # its annotations are not what it takes and returns
        try:
            texts, spans = render(
                conversations=[list(messages)],
                chat_template=self.jinja,
                return_assistant_tokens_mask=True,
                add_generation_prompt=generation_prompt,
                **self.variables,
            )
        except (TemplateError, TypeError, ValueError) as error:
            what = f"it does not render a conversation ({error}): {_excerpt(messages)}"
            raise InputError(WHERE, what, "Correct the rows, or use another template.") from error
        return texts[0], spans[0]

    def _cut(self, text: str, spans: Sequence[tuple[int, int]]) -> Iterator[Piece]:
        """Pieces of a rendered text, cut at special tokens and at the borders of spans."""
        matches = list(self._controls.finditer(text))
        starts = [match.start(match.lastindex or 0) for match in matches]
        ends = {_end_of(span, starts, len(text)) for span in spans}
        at = 0
        for start, match in zip(starts, matches, strict=True):
            yield from _words(text, at, match.start(), spans)
            yield Piece(match[match.lastindex or 0], _inside(start, spans), True, start in ends)
            at = match.end()
        yield from _words(text, at, len(text), spans)


def _words(text: str, start: int, end: int, spans: Sequence[tuple[int, int]]) -> Iterator[Piece]:
    """The text from `start` to `end`, which holds no special token, cut at the borders of spans."""
    borders = sorted({start, end, *(border for span in spans for border in span if start < border < end)})
    for left, right in pairwise(borders):
        yield Piece(text[left:right], _inside(left, spans))


def _inside(at: int, spans: Sequence[tuple[int, int]]) -> bool:
    return any(start <= at < end for start, end in spans)


def _end_of(span: tuple[int, int], controls: Sequence[int], length: int) -> int:
    """Where the special token that ends a turn starts: the last one in its span, or else the first one behind it."""
    inside = [at for at in controls if span[0] <= at < span[1]]
    return inside[-1] if inside else next((at for at in controls if at >= span[1]), length)


def _after(chars: int, pieces: Sequence[Piece]) -> Iterator[Piece]:
    """What is left of the pieces behind so many characters."""
    for piece in pieces:
        if rest := piece.text[chars:]:
            yield piece._replace(text=rest)
        chars = max(0, chars - len(piece.text))


def _either(words: Iterable[str]) -> str:
    """A pattern for any of the words; the longest one that fits wins."""
    return "|".join(re.escape(word) for word in sorted(words, key=lambda word: -len(word))) or r"(?!)"


class _Guard:
    """Messages with every special token in them swapped for a place holder."""

    def __init__(self, special: re.Pattern[str], messages: Sequence[Message]) -> None:
        self._found: list[str] = []
        self._holder = re.compile(r"(?!)")
        self.messages: list[dict[str, Any]] = [{"role": m["role"], "content": m["content"]} for m in messages]
        if not any(special.search(message["content"]) for message in messages):
            return
        used = {letter for message in messages for letter in message["content"]}
        left, right = [letter for letter in map(chr, PRIVATE_USE) if letter not in used][:2]
        self._holder = re.compile(f"{left}(\\d+){right}")
        for message in self.messages:
            message["content"] = special.sub(lambda match: self._hide(match[0], left, right), message["content"])

    def _hide(self, text: str, left: str, right: str) -> str:
        self._found.append(text)
        return f"{left}{len(self._found) - 1}{right}"

    def restore(self, text: str) -> str:
        """The text with the special tokens back in their places."""
        return self._holder.sub(lambda match: self._found[int(match[1])], text) if self._found else text


def own_template(tokenizer: PreTrainedTokenizerBase) -> JinjaTemplate:
    """The chat template of the tokenizer's folder.

    Raises:
        InputError: it has none, or one without generation spans, or that writes the date, or its answers do not end in
            a special token.
    """
    try:
        jinja = tokenizer.get_chat_template()
    except ValueError as error:
        what = "the tokenizer has no chat template of its own"
        raise InputError(WHERE, what, "Use one of our templates: tulu, llama3, chatml, smollm2.") from error
    if not GENERATION.search(jinja):
        what = "the tokenizer's chat template has no {% generation %} spans, so nothing says what is trained"
        raise InputError(WHERE, what, REMEDY)
    variables = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    _check_clock(jinja, variables)
    template = JinjaTemplate(
        name="model", end="", jinja=jinja, opening=(), variables=variables, specials=_specials(tokenizer)
    )
    probe: list[Message] = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    pieces = template.render(probe)
    end = next((piece.text for piece in pieces if piece.ends), None)
    if end is None:
        raise InputError(WHERE, "its answers do not end in a special token", REMEDY)
    asked = template.render(probe[:1])
    opening = tuple(_after(len(_join(asked)), template.render(probe[:1], generation_prompt=True)))
    bos = str(tokenizer.bos_token or "")
    opens = pieces[0] == Piece(bos, control=True) and bos not in {piece.text for piece in opening}
    return replace(template, end=end, opening=opening, bos=bos if opens else "")


def _check_clock(jinja: str, variables: Mapping[str, str]) -> None:
    """Refuse a template that writes the date, by which the same rows would be others tomorrow."""
    if "strftime_now" not in jinja:
        return
    render: Any = render_jinja_template  # as in `_jinja`
    asked: list[str] = []

    def clock(form: str) -> str:
        asked.append(form)
        return datetime.now().strftime(form)

    probe = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    with suppress(TemplateError, TypeError, ValueError):  # said where conversations are rendered
        for messages in (probe, [{"role": "system", "content": "Be brief."}, *probe]):
            render(conversations=[messages], chat_template=jinja, strftime_now=clock, **variables)
    if asked:
        what = f"it writes the date of the day ({asked[0]!r}), so the same rows would have other tokens tomorrow"
        raise InputError(WHERE, what, "Write a fixed date in its place: strftime_now must not be called.")


def _specials(tokenizer: PreTrainedTokenizerBase) -> tuple[Special, ...]:
    found: dict[str, Special] = {text: (text, False, False) for text in tokenizer.all_special_tokens}
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            found[token.content] = (token.content, token.lstrip, token.rstrip)
    return tuple(found.values())


def _join(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _excerpt(messages: Sequence[Message]) -> str:
    text = " | ".join(f"{message['role']}: {message['content']}" for message in messages)
    return text if len(text) <= 80 else f"{text[:77]}..."
