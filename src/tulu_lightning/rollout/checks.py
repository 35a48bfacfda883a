"""What an engine refuses before it computes anything."""

from collections.abc import Sequence
from typing import Any

from tulu_lightning.errors import InputError
from tulu_lightning.types import Sampling

__all__ = ["check_sampling", "check_sequences", "check_tokens"]


def check_sampling(n: int, sampling: Sampling) -> None:
    """Refuse numbers out of their range.

    Raises:
        InputError: as said.
    """
    where = "generate"
    if n < 1 or sampling.max_new_tokens < 1:
        raise InputError(where, f"n is {n}, max_new_tokens is {sampling.max_new_tokens}", "Give at least 1 of each.")
    if not 0 <= sampling.temperature < float("inf"):
        raise InputError(where, f"temperature is {sampling.temperature}", "Give 0 (greedy) or more.")
    if not 0 < sampling.top_p <= 1:
        raise InputError(where, f"top_p is {sampling.top_p}", "Give more than 0, at most 1 (1 leaves no token out).")
    if sampling.top_k < 0:
        raise InputError(where, f"top_k is {sampling.top_k}", "Give 0 (leaves no token out) or more.")


def check_tokens(prompts: Sequence[Sequence[int]], new: int, config: Any) -> None:
    """Refuse prompts that the model cannot read.

    Args:
        prompts: token ids.
        new: tokens that come after each.
        config: the model's, of transformers.

    Raises:
        InputError: an empty prompt, a token that the model does not know, more tokens than it has positions.
    """
    text_config = config.get_text_config(decoder=True)
    positions = getattr(text_config, "max_position_embeddings", None) or float("inf")
    for i, prompt in enumerate(prompts):
        where = f"generate, prompt {i}"
        if not len(prompt):
            raise InputError(where, "it is empty", "Give at least one token, e.g. BOS.")
        if len(prompt) + new > positions:
            what = f"{len(prompt)} tokens and {new} new ones, the model has {positions} positions"
            raise InputError(where, what, "Shorten the prompt or max_new_tokens.")
        if not (min(prompt) >= 0 and max(prompt) < text_config.vocab_size):
            what = f"its ids span [{min(prompt)}, {max(prompt)}], the model knows {text_config.vocab_size} tokens"
            raise InputError(where, what, "Use the model's own tokenizer.")


def check_sequences(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float, config: Any) -> None:
    """Refuse sequences whose log-probs are not defined.

    Raises:
        InputError: an empty prompt or response, unknown tokens, too many of them, a temperature that is not above 0.
    """
    if not 0 < temperature < float("inf"):
        raise InputError("logprobs", f"temperature is {temperature}", "Give a number above 0.")
    for i, (prompt, response) in enumerate(sequences):
        if not len(prompt) or not len(response):
            part = "response" if len(prompt) else "prompt"
            raise InputError(f"logprobs, sequence {i}", f"its {part} is empty", "Give at least one token of each.")
    check_tokens([[*prompt, *response] for prompt, response in sequences], 0, config)
