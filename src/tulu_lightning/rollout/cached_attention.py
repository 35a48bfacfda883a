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

    def append(self, layer: int, k: Tensor, v: Tensor, place: int | tuple[Tensor, Tensor]) -> None:
        """Write one token's keys and values [B, K, d] of the first B slots, at one place or at (slots, places)."""
        for room, new in zip(self.kv[layer], (k, v), strict=True):
            if isinstance(place, int):
                room[: len(new), :, place] = new
            else:
                room[place[0], :, place[1]] = new

    def read(self, layer: int, slots: int, places: int) -> tuple[Tensor, Tensor]:
        """Views [slots, K, places, d]."""
        keys, values = self.kv[layer, :, :slots, :, :places]
        return keys, values


@functools.cache
def _has_kernel() -> bool:
    """Whether PyTorch's CPU kernel that also gives the log of the softmax's sum is there; it is not public."""
    try:
        x = torch.ones(1, 1, 2, 8, dtype=torch.bfloat16)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x, 0.0, False, scale=1.0)
        # Two equal scores of 8: ln(2 e^8).
        return out.shape == x.shape and lse.shape == (1, 1, 2) and bool((lse - 8.6931).abs().max() < 0.01)
    except (AttributeError, RuntimeError, TypeError):
        return False


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention, and the log of each softmax's sum.

    Args:
        q: [B, K, G, d]; heads that share keys lie in G.
        k: [B, K, S, d].
        v: likewise.
        mask: added to the scores [B, 1, 1, S], or None.
        scale: of the scores.

    Returns:
        [B, K, G, d] in the dtype of `v` and float32 [B, K, G].
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and _has_kernel():
        # Its scores are fp32, those of a bf16 product would be rounded; in fp32 the products below are faster.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=mask, scale=scale
        )
    scores = ((q * scale) @ k.transpose(2, 3)).float()
    if mask is not None:
        scores = scores.add_(mask)
    lse = scores.logsumexp(-1)
    return scores.sub_(lse[..., None]).exp_().to(v.dtype) @ v, lse


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention over the union of two sets of keys, from the attention over each and its log of the softmax's sum."""
    (first, first_lse), (second, second_lse) = parts
    share = torch.sigmoid(first_lse - second_lse)[..., None]
    return (second + (first - second) * share).to(first.dtype)
