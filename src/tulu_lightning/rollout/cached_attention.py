"""Keys and values of decoding rows, and attention of one new token a row over its own and over shared ones."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Slots", "attention", "merge"]


class Slots:
    """Room for the keys and values of some rows, each from place 0 on.

    Args:
        shape: layers, slots, key heads, places, width.
        dtype: of keys and values.
        device: where they lie.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        # Zeros, because places past a row's end are read and weighted by 0, and 0 x NaN is NaN.
        self.kv = torch.zeros(shape[0], 2, *shape[1:], dtype=dtype, device=device)

    def fill(self, slot: int, start: int, kv: Tensor) -> None:
        """Write keys and values [layers, 2, tokens, K, d] from place `start` on."""
        self.kv[:, :, slot, :, start : start + kv.shape[2]] = kv.transpose(2, 3)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` places of one slot to another."""
        self.kv[:, :, target, :, :length] = self.kv[:, :, source, :, :length]

    def lines(self, places_B: Tensor) -> Tensor:
        """Where one token of each of the first B slots lies in a layer seen as lines of width d: int64 [B, 2K]."""
        _, _, slots, heads, places, _ = self.kv.shape
        start = torch.arange(2 * slots * heads, device=places_B.device).view(2, slots, heads)[:, : len(places_B)]
        return (start * places + places_B[:, None]).transpose(0, 1).flatten(1)

    def append(self, layer: int, kv: Tensor, where: int | Tensor) -> None:
        """Write one token's keys and values [B, 2K, d] of the first B slots, at one place or at their `lines`."""
        if isinstance(where, int):
            self.kv[layer, :, : len(kv), :, where] = kv.unflatten(1, (2, -1)).transpose(0, 1)
        else:
            self.kv[layer].view(-1, kv.shape[2])[where] = kv

    def read(self, layer: int, slots: int, places: int) -> tuple[Tensor, Tensor]:
        """Views [slots, K, places, d]."""
        keys, values = self.kv[layer, :, :slots, :, :places]
        return keys, values


@functools.cache
def _has_kernel() -> bool:
    """Whether PyTorch's CPU kernel that also gives the log of the softmax's sum is there; it is not public."""
    try:
        x = torch.ones(1, 1, 2, 8, dtype=torch.bfloat16)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(x, x, x, 0.0, False, scale=1.0)
        # Two equal scores of 8: ln(2 e^8).
        return out.shape == x.shape and lse.shape == (1, 1, 2) and bool((lse - 8.6931).abs().max() < 0.01)
    except (AttributeError, RuntimeError, TypeError):
        return False


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax attention of scaled queries, and the log of each softmax's sum.

    Args:
        q: [B, K, G, d]; heads that share keys lie in G.
        k: [B, K, S, d].
        v: likewise.
        mask: added to the scores [B, 1, 1, S], or None.

    Returns:
        [B, K, G, d] in the dtype of `v` and float32 [B, K, G].
    """
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float32) and _has_kernel():
        # One pass over the cache, fp32 scores. Batched products read it as fast only in copies without gaps.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
            q, k, v, 0.0, False, attn_mask=mask, scale=1.0
        )
    scores = (q @ k.transpose(2, 3)).float()
    if mask is not None:
        scores.add_(mask)
    lse = scores.logsumexp(-1)
    return scores.sub_(lse[..., None]).exp_().to(v.dtype) @ v, lse


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention over the union of two sets of keys, from the attention over each and its log of the softmax's sum."""
    (first, first_lse), (second, second_lse) = parts
    share = torch.sigmoid(first_lse - second_lse)[..., None]
    return (second + (first - second) * share).to(first.dtype)
