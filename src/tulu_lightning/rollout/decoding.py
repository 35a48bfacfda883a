"""What makes token-by-token decoding with a transformers model fast, registered with it as `tulu_decode`.

Two things that transformers does at every step are left out: repeating keys and values for the query heads that share
them, and copying the whole cache to append one token.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

__all__ = ["NAME", "CachedLM", "GrowingLayer", "use_fast_attention"]

NAME = "tulu_decode"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention; for one query token, heads that share keys stand in the query-length axis.

    `query` [B, H, 1, d] with `key`, `value` [B, K, S, d] is computed as [B, K, H/K, d]: same numbers, no copy of keys.
    """
    heads, length, shared = query.shape[1], query.shape[2], key.shape[1]
    simple = kwargs.get("position_bias") is None and (attention_mask is None or attention_mask.shape[1] == 1)
    if length != 1 or heads == shared or not simple:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    folded = query.reshape(query.shape[0], shared, heads // shared, query.shape[3])
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(query.shape[0], 1, heads, value.shape[3]), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class GrowingLayer(DynamicLayer):
    """A cache layer that writes new keys and values into room reserved for them, and hands out views."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append along the token axis. Room runs out only where the first estimate was too low."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._reserve(key_states, value_states, key_states.shape[0])
        start, end = self.filled, self.filled + key_states.shape[-2]
        if end > self.capacity:
            self.capacity = max(end, 2 * self.capacity)
            self._move(torch.arange(key_states.shape[0], device=key_states.device))
        self._room_k[:, :, start:end] = key_states
        self._room_v[:, :, start:end] = value_states
        return self._view(end)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep, repeat or drop rows: row i becomes what row `beam_idx[i]` was."""
        if self.filled:
            self._move(beam_idx)

    @property
    def filled(self) -> int:
        """Tokens held."""
        return self.get_seq_length()

    def _move(self, rows: Tensor) -> None:
        """New room with these rows of the old one."""
        end, (old_k, old_v) = self.filled, self._view(self.filled)
        self._reserve(old_k, old_v, len(rows))
        self._room_k[:, :, :end] = old_k.index_select(0, rows)
        self._room_v[:, :, :end] = old_v.index_select(0, rows)
        self._view(end)

    def _reserve(self, keys: Tensor, values: Tensor, rows: int) -> None:
        self._room_k = keys.new_empty(rows, keys.shape[1], self.capacity, keys.shape[3])
        self._room_v = values.new_empty(rows, values.shape[1], self.capacity, values.shape[3])

    def _view(self, end: int) -> tuple[Tensor, Tensor]:
        keys, values = self._room_k[:, :, :end], self._room_v[:, :, :end]
        self.keys, self.values = keys, values
        return keys, values


class CachedLM:
    """A causal LM as decoding sees it: tokens and a cache in, the logits after the last token out.

    Args:
        model: any causal LM of transformers whose forward takes an attention mask and a cache.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._takes = frozenset(inspect.signature(model.forward).parameters)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def new_cache(self, capacity: int) -> DynamicCache:
        """transformers' own cache for the architecture; its plain layers get room for `capacity` tokens."""
        cache = DynamicCache(config=self.model.config)
        cache.layers = [GrowingLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    @staticmethod
    def select(cache: DynamicCache, rows: Tensor) -> None:
        """Row i of the cache becomes what row `rows[i]` was: keeps, drops and repeats rows."""
        cache.reorder_cache(rows)  # type: ignore[arg-type]

    def can_share_prefix(self, cache: DynamicCache) -> bool:
        """Whether padding may stand between cached tokens and new ones.

        It may where the model is told the positions and every layer sees all tokens; a sliding window would count the
        padding.
        """
        return "position_ids" in self._takes and all(isinstance(layer, GrowingLayer) for layer in cache.layers)

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits `[B, V]` after the last of `ids` [B, L]; `mask` [B, past + L] and `positions` [B, L] tell of padding."""
        inputs: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
        # An index and not the number 1: that cuts a strided slice of the hidden states, for which torch on a CPU copies
        # the head once per row (1.7 GB for 32 rows of a 49k vocabulary).
        optional = {"position_ids": positions, "logits_to_keep": torch.tensor([ids.shape[1] - 1], device=ids.device)}
        inputs.update({name: value for name, value in optional.items() if name in self._takes})
        return self.model(input_ids=ids, **inputs).logits[:, -1]


def use_fast_attention(model: PreTrainedModel) -> None:
    """Our attention where the architecture would take SDPA through the attention interface; else its own."""
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(NAME)
