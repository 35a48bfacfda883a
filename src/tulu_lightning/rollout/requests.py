"""What a request to a vLLM engine must look like, and how its answer is read; in this process or over HTTP."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch

from tulu_lightning.core.step_plan import mix_seed
from tulu_lightning.errors import InputError
from tulu_lightning.rollout.checks import check_sampling
from tulu_lightning.rollout.delivery import Contents
from tulu_lightning.rollout.engine import Progress
from tulu_lightning.types import Completion, Finish, Sampling

__all__ = ["START_SHARE", "check_prompts", "check_sequences", "completion", "reporter", "seeds"]

HOTTEST = 2.0
START_SHARE = 0.01
"""Share of a GPU that has to be free for vLLM to start, where `kv_cache_memory_bytes` says what it takes. Its own 0.92
would refuse to start beside a trainer, though nothing else is made of it then (`request_memory` of its worker)."""


def check_prompts(
    prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, contents: Contents, positions: float
) -> None:
    """Refuse what the model cannot read, before it is asked.

    Args:
        prompts: token ids.
        n: samples per prompt.
        sampling: how.
        contents: of the model.
        positions: prompt and new tokens that the engine has room for.

    Raises:
        InputError: an empty prompt, an unknown token, too many tokens, or settings out of their range.
    """
    where = "generate"
    check_sampling(n, sampling)
    if sampling.temperature > HOTTEST:
        what = f"temperature is {sampling.temperature}"
        raise InputError(where, what, f"Give at most {HOTTEST}: vLLM takes no more.")
    for i, prompt in enumerate(prompts):
        _check_ids(f"{where}, prompt {i}", prompt, contents.vocabulary)
        if len(prompt) + sampling.max_new_tokens > positions:
            what = (
                f"{len(prompt)} tokens and {sampling.max_new_tokens} new ones, the engine has {positions:.0f} positions"
            )
            raise InputError(f"{where}, prompt {i}", what, "Shorten the prompt or max_new_tokens.")


def check_sequences(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float, contents: Contents, positions: float
) -> None:
    """Refuse sequences that `Engine.logprobs` cannot answer; errors as above."""
    if not 0 < temperature <= HOTTEST:
        remedy = f"It must be above 0 and at most {HOTTEST}: vLLM takes no more."
        raise InputError("logprobs", f"temperature is {temperature}", remedy)
    for i, (prompt, response) in enumerate(sequences):
        where = f"logprobs, sequence {i}"
        _check_ids(f"{where}, prompt", prompt, contents.vocabulary)
        _check_ids(f"{where}, response", response, contents.vocabulary)
        if len(prompt) + len(response) >= positions:  # vLLM samples one more token, which nobody reads
            what = f"it has {len(prompt) + len(response)} tokens, the engine can score {positions - 1:.0f}"
            raise InputError(where, what, "Shorten it.")


def _check_ids(where: str, ids: Sequence[int], vocabulary: int) -> None:
    if not len(ids):
        raise InputError(where, "it is empty", "Give at least one token, e.g. BOS.")
    if not (min(ids) >= 0 and max(ids) < vocabulary):
        what = f"its ids span [{min(ids)}, {max(ids)}], the model knows {vocabulary} tokens"
        raise InputError(where, what, "Use the model's own tokenizer.")


def seeds(seed: int, prompts: int, keys: Sequence[int] | None) -> list[int]:
    """One seed a prompt; vLLM gives sample j of a request that seed plus j.

    So the randomness of a sample depends on (seed, key, j) alone. 62 bits leave room for the addition.
    """
    if keys is not None and len(keys) != prompts:
        raise InputError("generate", f"{len(keys)} keys for {prompts} prompts", "Give one key a prompt.")
    return [mix_seed(seed, key) >> 1 for key in (range(prompts) if keys is None else keys)]


def completion(ids: Sequence[int], logprobs: Sequence[float], reason: str | None, version: int) -> Completion:
    """One sample as the trainer reads it.

    Raises:
        RuntimeError: log-probs that are not finite, or a reason to end that is neither a stop token nor the length.
    """
    if reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a sample for the reason {reason!r}, not by a stop token or its length")
    if len(ids) != len(logprobs) or not all(map(math.isfinite, logprobs)):
        raise RuntimeError("vLLM's probabilities are not finite: the weights hold infinities or NaNs")
    finish: Finish = "stop" if reason == "stop" else "length"
    return Completion(torch.tensor(ids, dtype=torch.int64), torch.tensor(logprobs), finish, version)


def reporter(progress: Progress | None, prompts: int, n: int, samples_each: int) -> Any:
    """What vLLM takes for tqdm, or False where nobody listens; it is told of samples as their prompts finish.

    Args:
        progress: who listens.
        prompts: how many there are.
        n: samples of each.
        samples_each: how many of them one that vLLM makes stands for (n when greedy, else 1).
    """
    if progress is None:
        return False

    class Bar:
        format_dict: ClassVar = {"elapsed": 1.0}

        def __init__(self, rows: Iterable[Any] = (), **_: Any) -> None:
            self.rows, self.n, self.postfix = rows, 0, ""

        def __iter__(self) -> Iterator[Any]:  # vLLM shows the reading of prompts with it, too
            return iter(self.rows)

        def update(self, samples: int) -> None:
            self.n += samples
            progress(self.n * samples_each, prompts * n)

        def refresh(self) -> None: ...

        def close(self) -> None: ...

    return Bar
