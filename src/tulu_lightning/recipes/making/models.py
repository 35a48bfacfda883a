"""Answers of the models of a pool, as they come: of checkpoints through our engines, or of servers."""

import gc
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from tulu_lightning.assets.models import generation_eos, load_tokenizer, resolve_model
from tulu_lightning.core.step_plan import mix_seed
from tulu_lightning.data import chat
from tulu_lightning.errors import InputError
from tulu_lightning.recipes.making.pool import Answer, Decoding, Model, Question
from tulu_lightning.recipes.making.servers import served
from tulu_lightning.rollout.engines import EngineSettings, build_engine
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.rollout.scoring import response_text
from tulu_lightning.types import Completion, Sampling

__all__ = ["answers", "rendered"]

CHUNKS = {"local": 32, "vllm": 512}
"""Prompts that an engine is given between two writes: what a kill can cost. vLLM is fast with many at a time."""


def answers(
    model: Model, questions: Iterable[Question], decoding: Decoding, seed: int, known: int = 0
) -> Iterator[tuple[Question, list[Answer]]]:
    """All answers of a model, as they come: a question's together from an engine, one at a time from a server.

    An answer for which a server's tries all fail is left out. What a local engine samples depends on seed, key and
    number alone, so a command that goes on samples what it would have. Questions are taken from `questions` as they are
    asked, so they need not all be in memory.

    Args:
        model: who writes.
        questions: what is asked.
        decoding: how.
        seed: of the samples.
        known: answers that the model gave to this command before. A server that gave some and refuses the few that are
            left over does not end the command.

    Raises:
        InputError: the model does not load, has no chat template, or a prompt does not fit; `give_up` requests of a
            server failed in a row.
    """
    if model.url is not None:
        return served(model, questions, decoding, seed, known)
    return _local(model, questions, decoding, seed)


def rendered(model: Model, question: Question) -> str:
    """The first thing that a model would see, for `--dry-run`: the text of a checkpoint, the messages for a server."""
    if model.path is None:
        return "\n".join(f"[{message['role']}] {message['content']}" for message in question.messages)
    tokenizer = load_tokenizer(model.path)
    return str(tokenizer.decode(_Renderer(model).prompts([question])[0]))


# Checkpoints --------------------------------------------------------------------------------------------------------


class _Renderer:
    """From conversations to token ids, and the tokens that end an answer."""

    def __init__(self, model: Model) -> None:
        assert model.path is not None
        self.folder = str(resolve_model(model.path))
        self.tokenizer = load_tokenizer(model.path)
        self.template = None if model.template is None else chat.chat_template(model.template, self.tokenizer)
        eos = generation_eos(self.folder)
        if self.template is not None:
            self.stop_ids = chat.stop_ids(self.tokenizer, self.template, eos)
        elif self.tokenizer.chat_template:
            self.stop_ids = tuple(sorted({*eos, int(self.tokenizer.eos_token_id)}))  # type: ignore[arg-type]
        else:
            remedy = "Name one: template: tulu (or llama3, chatml, smollm2)."
            raise InputError(f"model {model.name!r}", f"{model.path} has no chat template", remedy)

    def prompts(self, questions: Sequence[Question]) -> list[list[int]]:
        messages: Any = [question.messages for question in questions]
        if self.template is not None:
            return [
                one.ids for one in chat.encode_many(self.tokenizer, self.template, messages, generation_prompt=True)
            ]
        texts = [self.tokenizer.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in messages]
        return [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]  # type: ignore[arg-type]


def _local(
    model: Model, questions: Iterable[Question], decoding: Decoding, seed: int
) -> Iterator[tuple[Question, list[Answer]]]:
    chunks = _chunks(questions, CHUNKS[model.engine])
    first = next(chunks, None)
    if first is None:
        return
    ask = _Renderer(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = EngineSettings(model.engine, model.dtype)
    engine = build_engine(settings, lambda dtype: LocalEngine.from_folder(ask.folder, dtype, device), ask.folder)
    sampling = Sampling(decoding.max_new_tokens, decoding.temperature, ask.stop_ids, decoding.top_p)
    try:
        for chunk in itertools.chain([first], chunks):
            for n in sorted({max(question.numbers) + 1 for question in chunk}):
                part = [question for question in chunk if max(question.numbers) + 1 == n]
                prompts = ask.prompts(part)
                keys = [int(question.key[:12], 16) for question in part]
                groups = engine.generate(prompts, n, sampling, mix_seed(seed, 0), keys=keys)
                for question, prompt, group in zip(part, prompts, groups, strict=True):
                    yield question, [_answer(ask, j, group[j], prompt) for j in question.numbers]
    finally:
        engine.close()
        gc.collect()


def _chunks(questions: Iterable[Question], size: int) -> Iterator[list[Question]]:
    left = iter(questions)
    while chunk := list(itertools.islice(left, size)):
        yield chunk


def _answer(ask: _Renderer, number: int, made: Completion, prompt: Sequence[int]) -> Answer:
    text, ids = response_text(made, ask.tokenizer), made.ids_L.tolist()
    return Answer(number, text, made.finish, len(prompt), len(ids), ids, list(prompt))
