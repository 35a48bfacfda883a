"""The engine that needs nothing but transformers: its own copy of the policy, sampled in this process.

Rows are sorted by prompt length and cut into chunks. In a chunk each distinct prompt is computed once, its keys and
values are handed to all of its samples, and rows that finish leave the batch. The model's own forward is used, so any
causal LM that transformers knows will do.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from tulu_lightning.errors import InputError
from tulu_lightning.models.loading import load_causal_lm
from tulu_lightning.models.weights import full, plain_weights
from tulu_lightning.rollout.chunk import Chunk, Row
from tulu_lightning.rollout.decoding import CachedLM, use_fast_attention
from tulu_lightning.rollout.engine import Progress, RefreshError
from tulu_lightning.rollout.fingerprint import mark
from tulu_lightning.rollout.sampling import uniforms
from tulu_lightning.types import Completion, Sampling

__all__ = ["LocalEngine"]


class LocalEngine:
    """Samples in this process from an own copy of the weights; implements `rollout.engine.Engine`.

    Args:
        model: a causal LM that the engine may keep and overwrite; `from_folder` and `from_model` make one.
        version: version of its weights.
        max_rows: rows decoded together at most. Bounds the logits: rows x vocabulary x 4 bytes, three times over.
        batch_tokens: prompt and new tokens of the rows decoded together, at most. Bounds the cache of keys and values.
    """

    def __init__(
        self, model: PreTrainedModel, version: int = 0, max_rows: int = 256, batch_tokens: int = 16384
    ) -> None:
        for name, value in (("max_rows", max_rows), ("batch_tokens", batch_tokens)):
            if value < 1:
                raise InputError(f"engine.{name}", f"it is {value}", "Give at least 1.")
        self._model: PreTrainedModel = model.eval().requires_grad_(False)
        self._version = version
        self.max_rows, self.batch_tokens = max_rows, batch_tokens
        self._lm = CachedLM(model)

    @classmethod
    def from_folder(
        cls, path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", **limits: int
    ) -> Self:
        """An engine with the weights of a Hugging Face folder, in `dtype` (float32 if left out).

        Raises:
            InputError: the weights do not load.
        """
        with _quiet():
            model = load_causal_lm(path, dtype or torch.float32)
        use_fast_attention(model)
        model.to(device)  # type: ignore[arg-type]
        return cls(model, **limits)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        version: int = 0,
        **limits: int,
    ) -> Self:
        """An engine with a copy of the model's weights, in `dtype` on `device` (both the model's own if left out).

        `version` is stamped on the copy and on every completion that it makes. Adapters are merged.

        The attention that the model trains with is not copied. Global random state is left as it was. A sharded model
        is gathered tensor by tensor; then all ranks must call.
        """
        config = copy.deepcopy(model.config)
        config._attn_implementation = None  # let transformers choose what the architecture supports
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices), no_init_weights(), _quiet():
            own = AutoModelForCausalLM.from_config(config, dtype=dtype or model.dtype, trust_remote_code=False)
        own.tie_weights()  # left out together with the initial weights
        use_fast_attention(own)
        engine = cls(own.to(device or model.device), **limits)
        # Uninitialised memory until here: refresh proves that every tensor was written.
        engine.refresh(plain_weights(model), version)
        return engine

    @property
    def version(self) -> int:
        """Version of the weights held; -1 after a refresh that failed."""
        return self._version

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self._model.dtype

    def close(self) -> None:
        """Give the weights' memory back; no other call may follow."""
        del self._model, self._lm

    # -- weights --

    def fingerprint(self) -> dict[str, str]:
        """Dtype, shape and checksum of each tensor that the engine computes with."""
        return {name: mark(tensor) for name, tensor in self._model.state_dict().items()}

    @torch.no_grad()
    def refresh(
        self, named: Iterable[tuple[str, Tensor]], version: int, *, expected: Mapping[str, str] | None = None
    ) -> None:
        """See `Engine.refresh`. `expected` is `fingerprint.fingerprint(named, engine.dtype)` on the sender's side."""
        held = self._model.state_dict()
        self._version = -1  # until proven
        sent, unknown, shapes = dict[str, str](), [], []
        for name, tensor in named:
            source = full(tensor.detach())
            if name not in held:
                unknown.append(name)
            elif source.shape != held[name].shape:
                shapes.append(f"{name} {tuple(source.shape)} for {tuple(held[name].shape)}")
            else:
                source = source.to(held[name].device, held[name].dtype)
                sent[name] = mark(source)
                self._store(held[name], source)
        # Tied tensors are one piece of memory under several names: any of them delivers it, and where several were
        # sent, each must equal what is held in the end.
        written = {held[name].data_ptr() for name in sent}
        now = self.fingerprint()
        problems = {
            "not delivered": [name for name, tensor in held.items() if tensor.data_ptr() not in written],
            "unknown": unknown,
            "of another shape": shapes,
            "not held as sent": [name for name, word in sent.items() if now[name] != word],
            "not held as expected": [name for name, word in (expected or {}).items() if now.get(name) != word],
        }
        if any(problems.values()):
            raise RefreshError(problems)
        self._version = version

    @staticmethod
    def _store(target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    # -- sampling --

    @torch.no_grad()  # not inference mode: its tensors could not be trained on
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        *,
        keys: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`."""
        if self._version < 0:
            raise RuntimeError("the last weight refresh failed: the engine holds no known weights to sample from")
        self._check(prompts, n, sampling)
        if keys is not None and len(keys) != len(prompts):
            raise InputError("generate", f"{len(keys)} keys for {len(prompts)} prompts", "Give one key a prompt.")
        made: dict[Row, Completion] = {}
        for rows in self._chunks(prompts, n, sampling.max_new_tokens):
            names = [(row.prompt if keys is None else keys[row.prompt], row.sample) for row in rows]
            chunk = Chunk(
                self._lm, self._version, prompts, rows, sampling, uniforms(seed, names, sampling.max_new_tokens)
            )
            for finished in chunk.run():
                made.update(finished)
                if progress is not None:
                    progress(len(made), len(prompts) * n)
        return [[made[Row(i, j)] for j in range(n)] for i in range(len(prompts))]

    def _check(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling) -> None:
        where = "generate"
        if n < 1 or sampling.max_new_tokens < 1:
            raise InputError(
                where, f"n is {n}, max_new_tokens is {sampling.max_new_tokens}", "Give at least 1 of each."
            )
        if not 0 <= sampling.temperature < float("inf"):
            raise InputError(where, f"temperature is {sampling.temperature}", "Give 0 (greedy) or more.")
        text_config = self._model.config.get_text_config(decoder=True)
        positions = getattr(text_config, "max_position_embeddings", None) or float("inf")
        for i, prompt in enumerate(prompts):
            total = len(prompt) + sampling.max_new_tokens
            if not len(prompt):
                raise InputError(f"{where}, prompt {i}", "it is empty", "Give at least one token, e.g. BOS.")
            if total > positions:
                what = (
                    f"{len(prompt)} tokens and {sampling.max_new_tokens} new ones, the model has {positions} positions"
                )
                raise InputError(f"{where}, prompt {i}", what, "Shorten the prompt or max_new_tokens.")
            if not (min(prompt) >= 0 and max(prompt) < text_config.vocab_size):
                what = f"its ids span [{min(prompt)}, {max(prompt)}], the model knows {text_config.vocab_size} tokens"
                raise InputError(f"{where}, prompt {i}", what, "Use the model's own tokenizer.")

    def _chunks(self, prompts: Sequence[Sequence[int]], n: int, new: int) -> Iterator[list[Row]]:
        """Rows to decode together: neighbours in length, samples of equal prompts side by side, longest first."""
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), tuple(prompts[i])))
        chunk: list[Row] = []
        for i in order:
            for j in range(n):
                longest = len(prompts[chunk[0].prompt]) if chunk else 0
                if chunk and (len(chunk) == self.max_rows or (len(chunk) + 1) * (longest + new) > self.batch_tokens):
                    yield chunk
                    chunk = []
                chunk.append(Row(i, j))
        if chunk:
            yield chunk


@contextmanager
def _quiet() -> Iterator[None]:
    """No loading bars and no notes from transformers."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
