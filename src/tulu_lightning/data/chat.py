"""Chat messages to text and to token ids, with the mask of what is trained.

A template renders messages as pieces of text, each of which says whether it is trained and whether it is control (a
special token of the template's own). The mask comes from these pieces and from nothing else: no search in the text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from tulu_lightning.errors import InputError, nearest

__all__ = [
    "TEMPLATES",
    "ChatTemplate",
    "Encoded",
    "Message",
    "Piece",
    "chat_template",
    "encode",
    "encode_answer",
    "encode_many",
    "stop_ids",
    "truncate",
]

Message = Mapping[str, Any]
"""`role` (system, user or assistant) and `content`."""

CHATML_END = "<|im_end|>"
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What SmolLM2-Instruct's own template says where there is no system message; without it the model is far weaker."""


class Piece(NamedTuple):
    """A run of rendered text."""

    text: str
    trained: bool = False
    """Whether SFT learns it: the assistant's words and the token that ends its turn."""
    control: bool = False
    """Whether it is the template's own special token; everything else is data and can never become one."""


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written down, bound to one tokenizer's end-of-turn token."""

    name: str
    end: str
    """Token that ends an assistant turn."""
    jinja: str
    """The same template for `tokenizer.chat_template`, for use outside this package."""
    turn: Callable[[Message, str, bool], tuple[Piece, ...]]
    """Pieces of one turn, from (message, end token, whether it is the last message)."""
    opening: tuple[Piece, ...]
    """The generation prompt: what opens an assistant turn."""
    default_system: str = ""
    """System message put before a conversation that has none."""

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> tuple[Piece, ...]:
        """Pieces whose texts, joined, are the conversation.

        Args:
            messages: at least one.
            generation_prompt: end with the opening of an assistant turn.
        """
        if self.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        pieces: list[Piece] = []
        for index, message in enumerate(messages):
            pieces += self.turn(message, self.end, index == len(messages) - 1)
        return (*pieces, *self.opening) if generation_prompt else tuple(pieces)


def _tulu_turn(message: Message, end: str, last: bool) -> tuple[Piece, ...]:
    """Tülu 3 (section 4.3.1): plain-text headers, EOS after every assistant turn, no newline after the last one."""
    header = Piece(f"<|{message['role']}|>\n")
    if message["role"] != "assistant":
        return header, Piece(message["content"] + "\n")
    answer = header, Piece(message["content"], trained=True), Piece(end, trained=True, control=True)
    return answer if last else (*answer, Piece("\n"))


def _chatml_turn(message: Message, end: str, last: bool) -> tuple[Piece, ...]:
    """ChatML without a default system prompt; the newline after an end token is never trained."""
    trained = message["role"] == "assistant"
    return (
        Piece("<|im_start|>", control=True),
        Piece(f"{message['role']}\n"),
        Piece(message["content"], trained=trained),
        Piece(end, trained=trained, control=True),
        Piece("\n"),
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


def _tulu(eos: str) -> ChatTemplate:
    return ChatTemplate("tulu", eos, _TULU_JINJA, _tulu_turn, (Piece("<|assistant|>\n"),))


def _chatml(eos: str) -> ChatTemplate:
    opening = (Piece("<|im_start|>", control=True), Piece("assistant\n"))
    return ChatTemplate("chatml", CHATML_END, _CHATML_JINJA, _chatml_turn, opening)


def _smollm2(eos: str) -> ChatTemplate:
    chatml = _chatml(eos)
    system = (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\n" + SMOLLM2_SYSTEM + "<|im_end|>\n' }}{% endif %}"
    )
    return replace(chatml, name="smollm2", jinja=system + _CHATML_JINJA, default_system=SMOLLM2_SYSTEM)


TEMPLATES: dict[str, Callable[[str], ChatTemplate]] = {"tulu": _tulu, "chatml": _chatml, "smollm2": _smollm2}
"""Templates by name, each made from the tokenizer's EOS token."""


def chat_template(name: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The named template, bound to a tokenizer and tried out on it.

    Raises:
        InputError: no template has that name; a control token of it is not one token of this tokenizer; or text does
            not survive this tokenizer, so that ids and text would disagree.
    """
    if name not in TEMPLATES:
        raise InputError("template", f"there is no chat template {name!r}", nearest(name, TEMPLATES))
    template = TEMPLATES[name](str(tokenizer.eos_token))
    probe = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": " 2, as\nyou know"}] * 2
    pieces = template.render(probe)
    where, remedy = f"template {name!r}", "Use another template, or a tokenizer that was made for this one."
    for token in {piece.text for piece in pieces if piece.control}:
        if len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            raise InputError(where, f"its token {token} is not in the tokenizer's vocabulary", remedy)
    ids, _ = encode(tokenizer, template, probe)
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != "".join(piece.text for piece in pieces):
        raise InputError(where, "a test conversation comes back changed from the tokenizer", remedy)
    return template


def encode(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    messages: Sequence[Message],
    generation_prompt: bool = False,
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation and, for each, whether it is trained.

    Text runs are cut only where the mask changes or a control token stands, so the ids are those that tokenising the
    whole text gives, with two exceptions on purpose: a special token's name in a message stays ordinary text, and
    no token reaches over the border between prompt and answer (a sampler's cannot either). No BOS is added.
    """
    return _encode(tokenizer, template.render(messages, generation_prompt))


def encode_answer(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, text: str) -> list[int]:
    """Token ids of an answer to a generation prompt, with the end-of-turn token."""
    return _encode(tokenizer, (Piece(text, trained=True), Piece(template.end, trained=True, control=True)))[0]


def _encode(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    mask: list[bool] = []
    for (trained, control), run in groupby(pieces, key=lambda piece: (piece.trained, piece.control)):
        text = "".join(piece.text for piece in run)
        run_ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not control) if text else []
        ids += run_ids
        mask += [trained] * len(run_ids)
    return ids, mask


def stop_ids(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> tuple[int, ...]:
    """Ids that end a sampled response: the tokenizer's EOS and the template's end of turn, sorted."""
    end = tokenizer.encode(template.end, add_special_tokens=False)
    return tuple(sorted({int(tokenizer.eos_token_id), *end}))  # type: ignore[arg-type]


class Encoded(NamedTuple):
    """A conversation's tokens. (Stand-in, with the two functions below.)"""

    ids: list[int]
    weights: list[float]
    ends: tuple[int, ...]


def encode_many(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    conversations: Sequence[Sequence[Message]],
    train: str = "all",
) -> list[Encoded]:
    """Encode conversations, all texts of a call in parallel."""
    texts: list[str] = []
    plans: list[
        list[tuple[bool, int, str]]
    ] = []  # for each conversation: trained, index of its text or -1, control token
    for messages in conversations:
        plan: list[tuple[bool, int, str]] = []
        for (trained, control), run in groupby(
            template.render(messages), key=lambda piece: (piece.trained, piece.control)
        ):
            if control:
                plan += [(trained, -1, piece.text) for piece in run]
            elif text := "".join(piece.text for piece in run):
                plan.append((trained, len(texts), ""))
                texts.append(text)
        plans.append(plan)
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    coded = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    backend.encode_special_tokens = before
    result: list[Encoded] = []
    for messages, plan in zip(conversations, plans, strict=True):
        ids: list[int] = []
        weights: list[float] = []
        ends: list[int] = []
        turns = iter([float(message.get("weight", 1.0)) for message in messages if message["role"] == "assistant"])
        weight = 0.0
        trained_before = False
        for trained, index, control in plan:
            if trained and not trained_before:
                weight = next(turns)
            trained_before = trained
            run_ids = coded[index] if index >= 0 else tokenizer.encode(control, add_special_tokens=False)
            ids += run_ids
            weights += [weight if trained else 0.0] * len(run_ids)
            if trained and control:
                ends.append(len(ids))
        if train == "last" and len(ends) > 1:
            weights[: ends[-2]] = [0.0] * ends[-2]
        result.append(Encoded(ids, weights, tuple(ends)))
    return result


def truncate(encoded: Encoded, max_tokens: int) -> Encoded | None:
    """Cut after the last assistant turn that fits; None if there is none."""
    if len(encoded.ids) <= max_tokens:
        return encoded
    end = max((end for end in encoded.ends if end <= max_tokens), default=0)
    if not end:
        return None
    return Encoded(encoded.ids[:end], encoded.weights[:end], tuple(e for e in encoded.ends if e <= end))
