"""Attention over packed segments, registered with transformers as `tulu_segments`.

A segment's token sees the tokens of its chain of parents and its own earlier tokens, and nothing else. `layout` prepares
a pack for one backend, once per forward; every layer then calls the registered function with it. Which backend:
`models.backends`.

Exactness (packed equals alone, forward and backward) is tested against transformers' own attention.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from tulu_lightning.errors import InputError
from tulu_lightning.models.backends import Attend, Backend
from tulu_lightning.models.matmul import MatmulTiles
from tulu_lightning.types import Span

__all__ = ["NAME", "Layout", "layout", "segment_attention"]

NAME = "tulu_segments"
EXTRAS = ("softcap", "s_aux", "position_bias", "attention_bias", "head_mask")
"""What some architectures hand to their attention beside queries, keys and values."""
PADDING = 128
"""Padding is attended to in pieces of so many tokens, which costs next to nothing."""


class Layout:
    """A pack prepared for a backend. Opaque on purpose: a compiled layer must not specialise on what is in it."""

    def __init__(self, attend: Attend, reach: int) -> None:
        """Keep both.

        Args:
            attend: computes one layer.
            reach: most tokens that a token sees: the longest chain of segments.
        """
        self.attend, self.reach = attend, reach


def layout(
    spans: Sequence[Span], padding: int = 0, device: torch.device | None = None, backend: Backend = MatmulTiles
) -> Layout:
    """Prepare a pack.

    Args:
        spans: its segments; the last one is padding if there is any.
        padding: its tokens of padding.
        device: of the model.
        backend: what computes.
    """
    return _layout(spans, padding, device, backend)


def _prepare(spans: Sequence[Span], padding: int, device: torch.device | None, backend: Backend) -> Layout:
    rows = spans[: len(spans) - bool(padding)]
    reaches: list[int] = []
    for span in rows:
        reaches.append(span.end - span.start + (reaches[span.parent] if span.parent >= 0 else 0))
    end = spans[-1].end
    pieces = [Span(start, min(start + PADDING, end), -1) for start in range(end - padding, end, PADDING)]
    return Layout(backend([*rows, *pieces], device), max(reaches))


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    segments: Layout,
    sliding_window: int | None = None,
    **more: object,
) -> tuple[Tensor, None]:
    """Attention of one layer, in transformers' calling convention.

    Args:
        module: the attention layer (unused).
        query: [1, heads, T, head width].
        key: [1, key heads, T, head width]; each serves a group of the query's heads.
        value: like `key`.
        attention_mask: must be None: what may be seen is said by the segments alone.
        scaling: of the scores; 1 / sqrt(width) if left out.
        dropout: must be 0; a ratio of policies is 1 only without it.
        segments: from `layout`.
        sliding_window: may be set as long as no chain of segments is longer: then it hides nothing.
        more: what else a layer passes; extras that would change the scores are refused.

    Returns:
        [1, T, heads, head width] and no weights.

    Raises:
        InputError: the layer asks for more than causal attention.
    """
    _refuse(sliding_window, more, segments.reach)
    if attention_mask is not None or dropout:
        raise ValueError("packed attention takes neither an attention mask nor dropout")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        value = value.to(torch.get_autocast_dtype(kind))  # backends compute in the values' dtype
    return segments.attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None


def _refuse(sliding_window: int | None, more: Mapping[str, object], longest: int) -> None:
    extras = [name for name in EXTRAS if more.get(name) is not None]
    if extras:
        what = f"its attention layers use {' and '.join(extras)}, which packed attention does not compute"
        raise InputError("model", what, "Give a model with plain causal attention.")
    if sliding_window is not None and longest > sliding_window:
        what = f"a row of {longest} tokens is longer than the model's sliding window of {sliding_window}"
        raise InputError("model", what, "Lower data.init_args.max_tokens to the window, or give another model.")


# Compiled code breaks its graph at both: a pack's edges differ every time, and loops over them would be compiled anew.
_layout: Any = torch.compiler.disable(_prepare)
AttentionInterface.register(NAME, torch.compiler.disable(segment_attention))
# The mask transformers would build is T x T and knows nothing of parents; ours is said by the segments.
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
