"""Answers of the models of a pool, as they come: of checkpoints through our engines, or of servers."""

import gc
from collections.abc import Iterator, Sequence
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
from tulu_lightning.types import Sampling

__all__ = ["answers", "rendered"]

CHUNK = 32
"""Prompts that a local engine is given between two writes: what a kill can cost."""


def answers(
    model: Model, questions: Sequence[Question], decoding: Decoding, seed: int
) -> Iterator[tuple[Question, list[Answer]]]:
    """All answers of a model, as they come: a question's are given together.

    A question for which a server's tries all fail is left out. What a local engine samples depends on seed, key and
    number alone, so a command that goes on samples what it would have.

    Args:
        model: who writes.
        questions: what is asked.
        decoding: how.
        seed: of the samples.

    Raises:
        InputError: the model does not load, has no chat template, or a prompt does not fit; `give_up` requests of a
            server failed in a row.
    """
    ask = _local if model.url is None else served
    return ask(model, questions, decoding, seed)


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
    model: Model, questions: Sequence[Question], decoding: Decoding, seed: int
) -> Iterator[tuple[Question, list[Answer]]]:
    if not questions:
        return
    ask = _Renderer(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = EngineSettings(model.engine, model.dtype)
    engine = build_engine(settings, lambda dtype: LocalEngine.from_folder(ask.folder, dtype, device), ask.folder)
    sampling = Sampling(decoding.max_new_tokens, decoding.temperature, ask.stop_ids, decoding.top_p)
    try:
        for n in sorted({question.n for question in questions}):
            same = [question for question in questions if question.n == n]
            for at in range(0, len(same), CHUNK):
                part = same[at : at + CHUNK]
                prompts = ask.prompts(part)
                keys = [int(question.key[:12], 16) for question in part]
                groups = engine.generate(prompts, n, sampling, mix_seed(seed, 0), keys=keys)
                for question, prompt, group in zip(part, prompts, groups, strict=True):
                    yield (
                        question,
                        [
                            Answer(
                                response_text(c, ask.tokenizer),
                                c.finish,
                                len(prompt),
                                len(c.ids_L),
                                c.ids_L.tolist(),
                                list(prompt),
                            )
                            for c in group
                        ],
                    )
    finally:
        engine.close()
        gc.collect()
