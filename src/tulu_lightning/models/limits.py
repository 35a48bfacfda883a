"""What a model folder's config allows of the rows, asked before any weights load."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from transformers import AutoConfig, PreTrainedConfig

from tulu_lightning.errors import InputError
from tulu_lightning.types import Document, Prompt

__all__ = ["Limits", "check_documents", "check_prompts", "read_config", "read_limits"]


class Limits(NamedTuple):
    """What the rows of a run must keep to."""

    vocabulary: int
    """Token ids lie below it."""
    positions: int | None
    """Most tokens of a chain of segments; None where the architecture has no such number."""
    window: int | None
    """Sliding window of some layers, in tokens; packed attention has none, so no chain may be longer."""


def read_config(folder: str) -> PreTrainedConfig:
    """Read a model folder's `config.json`.

    Raises:
        InputError: it does not load.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(folder, f"its config.json does not load ({reason})", "Save the model again.") from error


def read_limits(folder: str) -> Limits:
    """What a model folder's `config.json` allows; errors as above."""
    config: Any = read_config(folder).get_text_config(decoder=True)
    layers = getattr(config, "layer_types", None)
    slides = layers is None or any("sliding" in kind for kind in layers)
    window = getattr(config, "sliding_window", None) if slides else None
    return Limits(config.vocab_size, getattr(config, "max_position_embeddings", None), window)


def check_documents(documents: Sequence[Document], folder: str) -> None:
    """Refuse documents that a model cannot read.

    Args:
        documents: the rows, tokenised; with an `extent` (lowest id, highest id, longest chain) they are not read.
        folder: the model folder.

    Raises:
        InputError: a token id outside the vocabulary, or a chain of segments that is too long.
    """
    if (extent := getattr(documents, "extent", None)) is not None:  # a store knows it, and need not be read for it
        lowest, highest, longest = extent
        _check([(lowest, highest)], longest, "", folder)
        return
    segments = [segment.ids_L for document in documents for segment in document.segments if segment.ids_L.numel()]
    if segments:
        ids = [(int(ids_L.min()), int(ids_L.max())) for ids_L in segments]
        _check(ids, max(map(_longest_chain, documents)), "", folder)


def check_prompts(prompts: Sequence[Prompt], new_tokens: int, folder: str) -> None:
    """Refuse prompts that a model cannot read, or cannot answer with that many new tokens; errors as above."""
    if prompts:
        longest = max(len(prompt.ids) for prompt in prompts) + new_tokens
        ids = [(min(prompt.ids), max(prompt.ids)) for prompt in prompts]
        _check(ids, longest, f" with the {new_tokens} new ones", folder)


def _longest_chain(document: Document) -> int:
    ends: list[int] = []
    for segment in document.segments:
        before = ends[segment.parent] if segment.parent >= 0 else 0
        ends.append(before + segment.ids_L.numel())
    return max(ends, default=0)


def _check(ids: Iterable[tuple[int, int]], longest: int, new: str, folder: str) -> None:
    limits = read_limits(folder)
    lowest, highest = (min(pair[0] for pair in ids), max(pair[1] for pair in ids))
    if lowest < 0 or highest >= limits.vocabulary:
        wrong = lowest if lowest < 0 else highest
        what = f"a row has the token id {wrong}, and the model {folder} knows 0 to {limits.vocabulary - 1}"
        raise InputError("data", what, "Use the model's own tokenizer (data.init_args.tokenizer) for all rows.")
    for limit, name in ((limits.positions, "positions"), (limits.window, "tokens in its sliding window")):
        if limit is not None and longest > limit:
            what = f"the longest row has {longest} tokens{new}, and the model {folder} has {limit} {name}"
            remedy = "Lower data.init_args.max_tokens (longer rows are dropped), or give another model."
            raise InputError("data", what, remedy)
