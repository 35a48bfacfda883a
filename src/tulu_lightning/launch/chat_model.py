"""A model that one talks to: its folder opened, conversations as token ids, replies as text while they are sampled."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from tulu_lightning.assets.models import generation_eos, load_tokenizer, resolve_model
from tulu_lightning.data import chat
from tulu_lightning.errors import InputError
from tulu_lightning.rollout.engine import Engine
from tulu_lightning.rollout.engines import EngineSettings, build_engine
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.types import Sampling

__all__ = ["ChatModel", "Manner", "open_chat_model", "stream_in_pieces", "words"]

PIECE = 16
"""Tokens at a time from engines that do not hand out single ones."""
LONGEST = 8192
"""Tokens of a conversation on vLLM, at most."""
HALF = "\ufffd"
"""What stands for a character of which not all bytes are there yet."""
OURS = ", ".join(chat.TEMPLATES)


class Manner(NamedTuple):
    """How replies are sampled."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0


def open_chat_model(
    path: str,
    kind: Literal["local", "vllm"] = "local",
    template: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> "ChatModel":
    """Open a model for talking.

    Args:
        path: folder, name or hub id.
        kind: of engine.
        template: one of ours by name; None takes the model's own.
        dtype: of the weights that the engine holds.

    Raises:
        InputError: no such model, no chat template, a template of other tokens than the model's, or no vLLM.
    """
    folder = str(resolve_model(path))
    tokenizer = load_tokenizer(path)
    if template is None and not tokenizer.chat_template:
        remedy = f"Name one of ours with --template ({OURS}), or save the tokenizer with its chat_template."
        raise InputError(path, "the model folder has no chat template, so nobody knows how to talk to it", remedy)
    ours = None if template is None else chat.chat_template(template, tokenizer)
    eos = generation_eos(folder)
    stops = {int(tokenizer.eos_token_id), *eos} if ours is None else {*chat.stop_ids(tokenizer, ours, eos)}  # type: ignore[arg-type]
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = EngineSettings(kind=kind, dtype=dtype)
    if (
        kind == "vllm"
    ):  # which sets the memory of a whole conversation aside: of 131,072 tokens it finds none on most machines
        positions = min(positions or LONGEST, LONGEST)
        settings = EngineSettings(kind=kind, dtype=dtype, max_model_len=positions, kv_cache_mb=None)
    engine = build_engine(settings, lambda each: LocalEngine.from_folder(folder, each, device), folder)
    # An engine settles how it computes when it is first used: while the model loads, not while somebody waits.
    engine.generate([[min(stops)]], 1, Sampling(1, 0.0, ()), 0)
    return ChatModel(path, tokenizer, ours, tuple(sorted(stops)), positions, engine)


class ChatModel:
    """One model.

    Args:
        name: what people call it.
        tokenizer: its own.
        template: one of ours; None for its own Jinja template.
        stops: token ids that end a reply.
        positions: longest conversation in tokens; None where the model has no limit.
        engine: holds its weights.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        template: chat.ChatTemplate | None,
        stops: tuple[int, ...],
        positions: int | None,
        engine: Engine,
    ) -> None:
        self.name, self.tokenizer, self.template, self.stops = name, tokenizer, template, stops
        self.positions, self.engine = positions, engine

    def prompt(self, messages: Sequence[chat.Message]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn.

        Raises:
            InputError: the model's template refuses the conversation, e.g. a system message.
        """
        if self.template is not None:
            return chat.encode(self.tokenizer, self.template, messages, generation_prompt=True)[0]
        try:
            text: Any = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # whatever a template may raise
            what = f"its chat template refuses the conversation ({' '.join(str(error).split())})"
            raise InputError(self.name, what, f"Leave out --system, or use --template ({OURS}).") from error
        return self.tokenizer.encode(text, add_special_tokens=False)

    def asked(self, messages: Sequence[chat.Message], manner: Manner) -> tuple[list[int], int]:
        """Token ids of a conversation, and how many the answer may have.

        Raises:
            InputError: the conversation leaves no room for an answer, or see `prompt`.
        """
        prompt = self.prompt(messages)
        room = manner.max_new_tokens
        if self.positions is not None:
            room = min(room, self.positions - len(prompt))
        if room < 1:
            what = f"the conversation is {len(prompt)} tokens long, and the model has {self.positions} positions"
            raise InputError(self.name, what, "Start a new conversation (/reset in the terminal).")
        return prompt, room

    def reply(self, messages: Sequence[chat.Message], manner: Manner) -> Iterator[str]:
        """The assistant's next turn, in pieces as they are sampled. Raises as `asked`."""
        prompt, room = self.asked(messages, manner)
        sampling = Sampling(room, manner.temperature, self.stops, manner.top_p)
        stream = getattr(self.engine, "stream", None)
        tokens = (
            stream_in_pieces(self.engine, prompt, sampling, manner.seed)
            if stream is None
            else stream(prompt, sampling, manner.seed)
        )
        return words(self.tokenizer, tokens, self.stops)

    def count(self, text: str) -> int:
        """Tokens that a text is."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def close(self) -> None:
        """Give the memory back."""
        self.engine.close()


def stream_in_pieces(engine: Engine, prompt: Sequence[int], sampling: Sampling, seed: int) -> Iterator[int]:
    """Tokens of an engine that only samples whole completions: a few at a time, each continuing the last ones.

    vLLM keeps keys and values of what it has seen (its prefix cache), so going on costs no second forward of it. Greedy
    tokens are those of one whole completion; sampled ones follow the same distribution, by other random numbers.
    """
    ids, made = list(prompt), 0
    while made < sampling.max_new_tokens:
        piece = sampling._replace(max_new_tokens=min(PIECE, sampling.max_new_tokens - made))
        ((completion,),) = engine.generate([ids], 1, piece, seed, keys=[made])
        found = completion.ids_L.tolist()
        yield from found
        if completion.finish == "stop":
            return
        ids += found
        made += len(found)


def words(tokenizer: PreTrainedTokenizerBase, tokens: Iterator[int], stops: Sequence[int]) -> Iterator[str]:
    """Text of tokens as they come; a character of several tokens waits for the last, and the stop token is left out."""
    ids: list[int] = []
    said = ""
    for token in tokens:
        if token in stops:
            break
        ids.append(token)
        text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)  # type: ignore[assignment]
        if text.endswith(HALF) or not text.startswith(said):
            continue
        if len(text) > len(said):
            yield text[len(said) :]
            said = text
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)  # type: ignore[assignment]
    if text.startswith(said) and len(text) > len(said):
        yield text[len(said) :]
