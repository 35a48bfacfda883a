"""Attention of one new token a row: over the row's own tokens, and over those that it shares with others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tulu_lightning.rollout.cached_attention import Slots, attention, merge
from tulu_lightning.rollout.compiled import Shared
from tulu_lightning.rollout.llama import LlamaLM

__all__ = ["StepAttention"]


class StepAttention:
    """One step of all running rows, layer by layer; the new tokens' keys and values go into the rows' slots.

    Args:
        lm: the model.
        own: slots 0 to B - 1 are the rows'.
        shared: slots of what groups of rows share.
        filled_B: int64 [B], tokens in each row's slot.
        group_B: slot of what each row shares.
        size_P: tokens in each of those slots; empty if rows share nothing.
    """

    def __init__(
        self, lm: LlamaLM, own: Slots, shared: Slots, filled_B: Tensor, group_B: Sequence[int], size_P: Sequence[int]
    ) -> None:
        self.lm, self.own, self.shared, self.filled_B = lm, own, shared, filled_B
        self.count, self.sizes = len(filled_B), size_P
        if lm.compiled is not None:
            self.members = Shared.of(group_B, size_P) if size_P else None
            return
        least, most = (int(x) for x in torch.aminmax(filled_B))
        self.places, ragged = most + 1, least < most
        self.where = own.lines(filled_B) if ragged else most
        self.own_mask = self._mask(filled_B + 1, self.places) if ragged else None
        if size_P:
            size = torch.tensor(size_P, device=filled_B.device)
            self.shared_mask = self._mask(size, max(size_P)) if min(size_P) < max(size_P) else None
            self._arrange(group_B)

    def _mask(self, length_B: Tensor, places: int) -> Tensor:
        """0 for the places of a row, -inf past them, [B, 1, 1, S]."""
        past = torch.arange(places, device=length_B.device) >= length_B[:, None]
        mask = torch.zeros(past.shape, dtype=self.lm.dtype, device=past.device).masked_fill_(past, -torch.inf)
        return mask[:, None, None]

    def _arrange(self, group_B: Sequence[int]) -> None:
        """Rows of one group side by side, as many places for each group; None where they lie so already."""
        members: list[list[int]] = [[] for _ in self.sizes]
        for row, group in enumerate(group_B):
            members[group].append(row)
        self.wide = max(map(len, members))
        flat = [row for rows in members for row in [*rows, *([rows[0]] * (self.wide - len(rows)))]]
        where = [0] * len(group_B)
        for group, rows in enumerate(members):
            for at, row in enumerate(rows):
                where[row] = group * self.wide + at
        self.gather = self.spread = None
        if flat != list(range(self.count)):
            self.gather, self.spread = (torch.tensor(x, device=self.lm.device) for x in (flat, where))

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """See `llama.Attend`."""
        if self.lm.compiled is not None:
            kv = self.own.kv[layer], self.filled_B, self.members, self.shared.kv[layer]
            return self.lm.compiled.attend(qkv, *kv)
        self.own.append(layer, qkv[:, self.lm.heads :], self.where)
        q = qkv[:, : self.lm.heads].unflatten(1, (self.lm.key_heads, -1))
        own = attention(q, *self.own.read(layer, self.count, self.places), self.own_mask)
        seen = merge([self._over_shared(layer, q), own]) if self.sizes else own[0]
        return seen.reshape(self.count, -1)

    def _over_shared(self, layer: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """All rows of a group at once: the group's keys are read once, not once a row."""
        groups, (_, heads, group, width) = len(self.sizes), q.shape
        if self.gather is not None:
            q = q[self.gather]
        q = q.unflatten(0, (groups, self.wide)).transpose(1, 2).reshape(groups, heads, -1, width)
        keys, values = self.shared.read(layer, groups, max(self.sizes))
        parts = attention(q, keys, values, self.shared_mask)
        out, lse = (x.unflatten(2, (self.wide, group)).transpose(1, 2).flatten(0, 1) for x in (parts[0], parts[1]))
        return (out, lse) if self.spread is None else (out[self.spread], lse[self.spread])
