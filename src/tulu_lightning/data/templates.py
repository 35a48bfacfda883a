"""Chat templates: a conversation as pieces of text, each of which says whether it is trained and whether it is control.

The loss mask comes from these pieces and from nothing else: nobody searches the text afterwards.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

__all__ = ["SMOLLM2_SYSTEM", "TEMPLATES", "ChatTemplate", "Message", "Piece", "TurnTemplate"]

Message = Mapping[str, Any]
"""`role` (system, user or assistant) and `content`; an assistant's message may have a `weight` (1 if left out)."""

CHATML_END = "<|im_end|>"
LLAMA3_BOS, LLAMA3_END = "<|begin_of_text|>", "<|eot_id|>"
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What SmolLM2-Instruct's own template says where there is no system message; without it the model is far weaker."""


class Piece(NamedTuple):
    """A run of rendered text."""

    text: str
    trained: bool = False
    """Whether SFT learns it: the assistant's words and the token that ends its turn."""
    control: bool = False
    """Whether it is the template's own special token; everything else is data and can never become one."""
    ends: bool = False
    """Whether an assistant turn is over after it: its end token."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How a conversation is written down, bound to one tokenizer's tokens."""

    name: str
    end: str
    """Token that ends an assistant turn."""
    jinja: str
    """The same template for `tokenizer.chat_template`, for use outside this package."""
    opening: tuple[Piece, ...]
    """The generation prompt: what opens an assistant turn."""
    bos: str = ""
    """Token that opens every conversation, once; empty for a template without one."""

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> tuple[Piece, ...]:
        """Pieces whose texts, joined, are the conversation.

        Args:
            messages: at least one.
            generation_prompt: end with the opening of an assistant turn.
        """
        raise NotImplementedError

    def answer(self, text: str) -> tuple[Piece, ...]:
        """What follows the generation prompt when the assistant says `text`: its words and the end token."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TurnTemplate(ChatTemplate):
    """A template that writes one turn after the other."""

    turn: Callable[[Message, str, bool], tuple[Piece, ...]]
    """Pieces of one turn, from (message, end token, whether it is the last message)."""
    default_system: str = ""
    """System message put before a conversation that has none."""

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> tuple[Piece, ...]:
        """As in `ChatTemplate`."""
        if self.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        pieces: list[Piece] = [Piece(self.bos, control=True)] if self.bos else []
        last = len(messages) - 1
        for index, message in enumerate(messages):
            pieces += self.turn(message, self.end, index == last)
        return (*pieces, *self.opening) if generation_prompt else tuple(pieces)

    def answer(self, text: str) -> tuple[Piece, ...]:
        """As in `ChatTemplate`."""
        pieces = self.turn({"role": "assistant", "content": text}, self.end, True)
        return tuple(piece for piece in pieces if piece.trained)


def _tulu_turn(message: Message, end: str, last: bool) -> tuple[Piece, ...]:
    """Tülu 3 (section 4.3.1): plain-text headers, EOS after every assistant turn, no newline after the last one."""
    header = Piece(f"<|{message['role']}|>\n")
    if message["role"] != "assistant":
        return header, Piece(message["content"] + "\n")
    answer = header, Piece(message["content"], True), Piece(end, True, True, True)
    return answer if last else (*answer, Piece("\n"))


_IM_START = Piece("<|im_start|>", control=True)
_NEWLINE = Piece("\n")


def _chatml_turn(message: Message, end: str, last: bool) -> tuple[Piece, ...]:
    """ChatML without a default system prompt; the newline after an end token is never trained."""
    trained = message["role"] == "assistant"
    return (
        _IM_START,
        Piece(f"{message['role']}\n"),
        Piece(message["content"], trained),
        Piece(end, trained, True, trained),
        _NEWLINE,
    )


_HEADER = Piece("<|start_header_id|>", control=True), Piece("<|end_header_id|>", control=True)
_BLANK_LINE = Piece("\n\n")


def _llama3_turn(message: Message, end: str, last: bool) -> tuple[Piece, ...]:
    """Llama 3 and 3.1 Instruct (Meta's model card): white space around a message is dropped."""
    trained = message["role"] == "assistant"
    return (
        _HEADER[0],
        Piece(message["role"]),
        _HEADER[1],
        _BLANK_LINE,
        Piece(message["content"].strip(), trained),
        Piece(end, trained, True, trained),
    )


_JINJA_ROLES = (
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
)
_TULU_JINJA = (
    "{% for message in messages %}" + _JINJA_ROLES + "{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if message['role'] != 'assistant' or not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_CHATML_JINJA = (
    "{% for message in messages %}" + _JINJA_ROLES + "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3_JINJA = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}" + _JINJA_ROLES + "{{ '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n' }}{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def _tulu(eos: str) -> TurnTemplate:
    opening = (Piece("<|assistant|>\n"),)
    return TurnTemplate(name="tulu", end=eos, jinja=_TULU_JINJA, opening=opening, turn=_tulu_turn)


def _chatml(eos: str) -> TurnTemplate:
    opening = (_IM_START, Piece("assistant\n"))
    return TurnTemplate(name="chatml", end=CHATML_END, jinja=_CHATML_JINJA, opening=opening, turn=_chatml_turn)


def _smollm2(eos: str) -> TurnTemplate:
    system = (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\n" + SMOLLM2_SYSTEM + "<|im_end|>\n' }}{% endif %}"
    )
    return replace(_chatml(eos), name="smollm2", jinja=system + _CHATML_JINJA, default_system=SMOLLM2_SYSTEM)


def _llama3(eos: str) -> TurnTemplate:
    opening = (_HEADER[0], Piece("assistant"), _HEADER[1], _BLANK_LINE)
    return TurnTemplate(
        name="llama3", end=LLAMA3_END, jinja=_LLAMA3_JINJA, opening=opening, bos=LLAMA3_BOS, turn=_llama3_turn
    )


TEMPLATES: dict[str, Callable[[str], TurnTemplate]] = {
    "tulu": _tulu,
    "llama3": _llama3,
    "chatml": _chatml,
    "smollm2": _smollm2,
}
"""Templates by name, each made from the tokenizer's EOS token. `model` (`own_template.py`) is the one besides them."""
