"""Answers of the models of a pool, as they come: of checkpoints through our engines, or of servers."""

import gc
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from tulu_lightning.assets.models import generation_eos, load_tokenizer, resolve_model
from tulu_lightning.core.step_plan import mix_seed
from tulu_lightning.data import chat
from tulu_lightning.errors import InputError
from tulu_lightning.models.limits import read_config
from tulu_lightning.recipes.making.pool import Answer, Decoding, Model, Question
from tulu_lightning.recipes.making.servers import served
from tulu_lightning.rollout.engine import Engine
from tulu_lightning.rollout.engines import EngineSettings, build_engine
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.rollout.scoring import response_text
from tulu_lightning.types import Completion, Sampling

__all__ = ["answers", "rendered"]

CHUNKS = {"local": 32, "vllm": 512}
"""Prompts that an engine is given between two writes: what a kill can cost. vLLM is fast with many at a time."""
PROMPT = 8192
"""Tokens of a prompt that vLLM has room for beside the longest answer; a longer one gets a shorter answer."""
STEP = 256
"""Answers with less room than is wanted have a multiple of so many tokens, so that many prompts share one."""


def answers(
    model: Model, questions: Iterable[Question], decoding: Decoding, seed: int, known: int = 0
) -> Iterator[tuple[Question, list[Answer]]]:
    """All answers of a model, as they come: a question's together from an engine, one at a time from a server.

    An answer for which a server's tries all fail is left out, and so is one to a prompt for which a model has no room. What a local engine samples depends on seed, key and
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
        InputError: the model does not load, has no chat template, or room for none of the prompts; `give_up`
            requests of a server failed in a row.
    """
    if model.url is not None:
        return served(model, questions, decoding, seed, known)
    return _local(model, questions, decoding, seed, known)


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
    model: Model, questions: Iterable[Question], decoding: Decoding, seed: int, known: int
) -> Iterator[tuple[Question, list[Answer]]]:
    chunks = _chunks(questions, CHUNKS[model.engine])
    first = next(chunks, None)
    if first is None:
        return
    ask = _Renderer(model)
    room = _Room(model, ask.folder, decoding.max_new_tokens)
    engine: Engine | None = None
    try:
        for chunk in itertools.chain([first], chunks):
            for (n, new_tokens), part in room.parts(chunk, ask.prompts(chunk)):
                engine = engine or _engine(model, ask.folder, room.longest)
                sampling = Sampling(new_tokens, decoding.temperature, ask.stop_ids, decoding.top_p)
                keys = [int(question.key[:12], 16) for question, _ in part]
                groups = engine.generate([prompt for _, prompt in part], n, sampling, mix_seed(seed, 0), keys=keys)
                for (question, prompt), group in zip(part, groups, strict=True):
                    yield question, [_answer(ask, j, group[j], prompt) for j in question.numbers]
        room.tell(known)
    finally:
        if engine is not None:
            engine.close()
        gc.collect()


def _engine(model: Model, folder: str, longest: int | None) -> Engine:
    settings = EngineSettings(model.engine, model.dtype)
    if model.engine == "vllm":  # which sets the memory of a whole sample aside, and on a GPU takes what there is
        settings = EngineSettings("vllm", model.dtype, max_model_len=longest, kv_cache_mb=None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return build_engine(settings, lambda dtype: LocalEngine.from_folder(folder, dtype, device), folder)


class _Room:
    """What a model has positions for: long prompts get shorter answers, too long ones none, and both are told.

    How long an answer may be depends on its prompt alone, so that it is the same after a kill.
    """

    def __init__(self, model: Model, folder: str, wanted: int) -> None:
        positions = getattr(read_config(folder).get_text_config(decoder=True), "max_position_embeddings", None)
        if model.engine == "vllm":
            positions = min(positions or wanted + PROMPT, wanted + PROMPT)
        self.longest: int | None = positions
        """Prompt and answer together, in tokens; None where there is no limit."""
        self._name, self._wanted = model.name, wanted
        self._fit = self._shortened = self._too_long = 0

    def parts(
        self, questions: Sequence[Question], prompts: Sequence[list[int]]
    ) -> list[tuple[tuple[int, int], list[tuple[Question, list[int]]]]]:
        """Questions that are sampled together, by how many answers are sampled and how many tokens each may have."""
        found: dict[tuple[int, int], list[tuple[Question, list[int]]]] = defaultdict(list)
        for question, prompt in zip(questions, prompts, strict=True):
            left = self._wanted if self.longest is None else self.longest - len(prompt)
            if left < self._wanted and left > STEP:
                left -= left % STEP
            self._too_long += left < 1
            self._shortened += 1 <= left < self._wanted
            if left >= 1:
                self._fit += 1
                found[max(question.numbers) + 1, min(left, self._wanted)].append((question, prompt))
        return sorted(found.items(), key=lambda each: each[0])

    def tell(self, known: int) -> None:
        """Say what did not fit, as an error where nothing did."""
        if self._too_long and not self._fit and not known:
            what = f"has room for {self.longest:,} tokens, and every prompt is longer"
            raise InputError(f"model {self._name!r}", what, "Use a model with more positions, or shorter prompts.")
        if self._too_long or self._shortened:
            told = f"{self._too_long:,} prompts are too long for it, {self._shortened:,} leave less room for an answer"
            what = f"model {self._name!r} has room for {self.longest:,} tokens: {told} than {self._wanted:,}"
            print(what, file=sys.stderr)


def _chunks(questions: Iterable[Question], size: int) -> Iterator[list[Question]]:
    left = iter(questions)
    while chunk := list(itertools.islice(left, size)):
        yield chunk


def _answer(ask: _Renderer, number: int, made: Completion, prompt: Sequence[int]) -> Answer:
    text, ids = response_text(made, ask.tokenizer), made.ids_L.tolist()
    return Answer(number, text, made.finish, len(prompt), len(ids), ids, list(prompt))
