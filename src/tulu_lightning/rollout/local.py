"""The engine that needs nothing but transformers: its own copy of the policy, sampled in this process.

Each distinct prompt is computed once for all of its samples, and rows that finish leave the batch. Llama-shaped models
(`rollout.llama`) run through a forward of our own over packed weights, where rows that wait take the slots of those that
finished (`rollout.batch`); all others through the model's own forward, chunk by chunk (`rollout.chunk`).
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from tulu_lightning.errors import InputError
from tulu_lightning.models.loading import load_causal_lm
from tulu_lightning.models.weights import full, plain_weights
from tulu_lightning.rollout.batch import Batch
from tulu_lightning.rollout.checks import check_sampling, check_sequences, check_tokens
from tulu_lightning.rollout.chunk import Chunk, chunks
from tulu_lightning.rollout.decoding import CachedLM, use_fast_attention
from tulu_lightning.rollout.engine import Health, Made, Progress, RefreshError
from tulu_lightning.rollout.fingerprint import mark
from tulu_lightning.rollout.llama import LlamaLM, recognise
from tulu_lightning.rollout.plan import Row, sections
from tulu_lightning.rollout.sampling import uniforms
from tulu_lightning.rollout.stop_texts import StopTexts
from tulu_lightning.rollout.token_logprobs import by_forward, by_llama
from tulu_lightning.types import Completion, Sampling

__all__ = ["LocalEngine"]


class LocalEngine:
    """Samples in this process from an own copy of the weights; implements `rollout.engine.Engine`.

    Args:
        model: a causal LM that the engine may keep and overwrite; `from_folder` and `from_model` make one.
        version: version of its weights.
        max_rows: rows decoded together at most. Bounds the logits: rows x vocabulary x 4 bytes, three times over.
        batch_tokens: prompt and new tokens of the rows decoded together, at most (one row is always decoded). Bounds
            the cache of keys and values; a prompt that rows share counts once.
        decode: "auto" takes the fast path for models that it fits, compiled where it can be (`rollout.compiled`);
            "torch" the fast path in PyTorch's operators alone; "transformers" the model's own forward for all. The fast
            path keeps a packed copy of the matrices on a CPU.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        version: int = 0,
        max_rows: int = 256,
        batch_tokens: int = 16384,
        decode: Literal["auto", "torch", "transformers"] = "auto",
    ) -> None:
        for name, value in (("max_rows", max_rows), ("batch_tokens", batch_tokens)):
            if value < 1:
                raise InputError(f"engine.{name}", f"it is {value}", "Give at least 1.")
        self._model: PreTrainedModel = model.eval().requires_grad_(False)
        self._version = version
        self.max_rows, self.batch_tokens = max_rows, batch_tokens
        self._lm = CachedLM(model)
        self._fast: LlamaLM | None = None
        self._chosen, self._compiled = decode == "transformers", decode == "auto"

    @classmethod
    def from_folder(
        cls, path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", **options: Any
    ) -> Self:
        """An engine with the weights of a Hugging Face folder, in `dtype` (float32 if left out).

        Raises:
            InputError: the weights do not load.
        """
        with _quiet():
            model = load_causal_lm(path, dtype or torch.float32)
        use_fast_attention(model)
        model.to(device)  # type: ignore[arg-type]
        return cls(model, **options)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        version: int = 0,
        **options: Any,
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
        engine = cls(own.to(device or model.device), **options)
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
        self._version, self._fast, self._chosen = -1, None, True
        del self._model, self._lm

    def health(self) -> Health:
        """See `Engine.health`."""
        if not hasattr(self, "_model"):
            return Health(False, -1, "the engine in this process was closed")
        where = f"{type(self._model).__name__} in this process, {self.dtype} on {self._model.device}"
        if self._version < 0:
            return Health(False, -1, f"{where}: its last weight refresh failed, it holds no known weights")
        return Health(True, self._version, where)

    # -- weights --

    def fingerprint(self) -> dict[str, str]:
        """Dtype, shape and checksum of each tensor that the engine computes with, packed ones read back."""
        held = self._model.state_dict()
        used = {} if self._fast is None else {name: mark(tensor) for name, tensor in self._fast.used()}
        return {name: used[name] if name in used else mark(tensor) for name, tensor in held.items()}

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
        if self._fast is not None:
            self._fast.repack()
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
        made: Made | None = None,
        stop_texts: StopTexts | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`."""
        self._must_hold_weights()
        check_sampling(n, sampling)
        check_tokens(prompts, sampling.max_new_tokens, self._model.config)
        if keys is not None and len(keys) != len(prompts):
            raise InputError("generate", f"{len(keys)} keys for {len(prompts)} prompts", "Give one key a prompt.")

        def luck(rows: Sequence[Row]) -> Tensor:
            names = [(row.prompt if keys is None else keys[row.prompt], row.sample) for row in rows]
            return uniforms(seed, names, sampling.max_new_tokens)

        ended: dict[Row, Completion] = {}

        def group(i: int) -> list[Completion]:
            return [ended[Row(i, j)] for j in range(n)]

        left = [n] * len(prompts)
        for part in self._parts(prompts, n, sampling, luck, stop_texts):
            for finished in part.run():
                ended.update(finished)
                for row in finished:
                    left[row.prompt] -= 1
                    if made is not None and left[row.prompt] == 0:
                        made(row.prompt, group(row.prompt))
                if finished and progress is not None:
                    progress(len(ended), len(prompts) * n)
        return [group(i) for i in range(len(prompts))]

    @torch.no_grad()
    def stream(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Iterator[int]:
        """The tokens of `generate([prompt], 1, sampling, seed)`, each as soon as it is drawn, a stop token included.

        Raises:
            InputError: an empty prompt, a token that the model does not know, or more tokens than it has positions.
        """
        self._must_hold_weights()
        check_sampling(1, sampling)
        check_tokens([prompt], sampling.max_new_tokens, self._model.config)
        luck = uniforms(seed, [(0, 0)], sampling.max_new_tokens)
        for part in self._parts([prompt], 1, sampling, lambda _: luck):
            for _ in part.run():
                yield int(part.drawn[0])

    def _parts(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        luck: Callable[[Sequence[Row]], Tensor],
        stop_texts: StopTexts | None = None,
    ) -> Iterator[Batch | Chunk]:
        """What is decoded together, part by part; each is to be run before the next is asked for."""
        limits = (sampling.max_new_tokens, self.max_rows, self.batch_tokens)
        fast = self._fast_path()
        if fast is not None:
            for section in sections(prompts, n, *limits):
                yield Batch(fast, self._version, section, sampling, luck, stop_texts)
            return
        for rows in chunks(prompts, n, *limits):
            yield Chunk(self._lm, self._version, prompts, rows, sampling, luck(rows), stop_texts)

    @torch.no_grad()
    def logprobs(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0
    ) -> list[Tensor]:
        """See `Engine.logprobs`; computed with the weights that decoding uses, the packed ones on the fast path."""
        self._must_hold_weights()
        check_sequences(sequences, temperature, self._model.config)
        fast = self._fast_path()
        if fast is not None:
            return by_llama(fast, sequences, temperature)
        return by_forward(self._model, sequences, temperature)

    def _must_hold_weights(self) -> None:
        if self._version < 0:
            raise RuntimeError("the last weight refresh failed: the engine holds no known weights to sample from")

    def _fast_path(self) -> LlamaLM | None:
        """Chosen when weights are first used: the choice compares logits, and an engine may be built without weights."""
        if not self._chosen:
            self._fast, self._chosen = recognise(self._model, self._compiled), True
        return self._fast


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
