"""Chat messages to text and to token ids, with the mask of what is trained: the door to the files that do it.

`templates.py` writes conversations down, `own_template.py` as the model's own Jinja template does, `encoding.py`
tokenises what they wrote, and `doctor.py` looks at the result.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from tulu_lightning.data.encoding import (
    PLAIN,
    Encoded,
    Train,
    encode_many,
    encode_pieces,
    message_weight,
    rendered,
    truncate,
)
from tulu_lightning.data.own_template import own_template
from tulu_lightning.data.templates import TEMPLATES, ChatTemplate, Message, Piece
from tulu_lightning.errors import InputError, nearest

__all__ = [
    "PLAIN",
    "TEMPLATES",
    "ChatTemplate",
    "Encoded",
    "Message",
    "Piece",
    "Train",
    "chat_template",
    "encode",
    "encode_answer",
    "encode_many",
    "message_weight",
    "stop_ids",
    "truncate",
]

OWN = "model"
"""Name of the template that is the model's own."""


def chat_template(name: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The named template, bound to a tokenizer and tried out on it.

    Raises:
        InputError: no template has that name; a control token of it is not one token of this tokenizer; text does
            not survive this tokenizer, so that ids and text would disagree; or the model has no template of its own
            that says what is trained.
    """
    if name not in TEMPLATES and name != OWN:
        raise InputError("template", f"there is no chat template {name!r}", nearest(name, [*TEMPLATES, OWN]))
    template = own_template(tokenizer) if name == OWN else TEMPLATES[name](str(tokenizer.eos_token))
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
    no token reaches over the border between prompt and answer (a sampler's cannot either). The tokenizer adds no BOS;
    a template that wants one writes it.
    """
    return encode_pieces(tokenizer, rendered(template, messages, generation_prompt))


def encode_answer(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, text: str) -> list[int]:
    """Token ids of an answer to a generation prompt, with the end-of-turn token."""
    return encode_pieces(tokenizer, template.answer(text))[0]


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, generation_config_eos: Sequence[int] = ()
) -> tuple[int, ...]:
    """Ids that end a sampled response, sorted.

    They are the tokenizer's EOS, the template's end of turn, and what the model folder's generation config stops on
    (`assets.models.generation_eos`): Llama 3.1 names three there.
    """
    end = tokenizer.encode(template.end, add_special_tokens=False)
    return tuple(sorted({int(tokenizer.eos_token_id), *end, *generation_config_eos}))  # type: ignore[arg-type]
