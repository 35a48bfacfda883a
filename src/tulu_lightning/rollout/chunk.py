"""A chunk of rows, sampled token by token: prompts once, then all rows that still run, one token a step."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tulu_lightning.rollout.decoding import CachedLM
from tulu_lightning.rollout.plan import Row, common
from tulu_lightning.rollout.sampling import pick
from tulu_lightning.rollout.stop_texts import StopTexts, ended
from tulu_lightning.types import Completion, Sampling

__all__ = ["Chunk", "chunks"]

MIN_PREFIX = 8
"""Tokens that all prompts of a chunk must begin with before it pays to compute them apart."""


class Chunk:
    """Rows decoded together. Axis B: the rows still running, in the order of the cache; axis S: tokens in the cache.

    Args:
        lm: the model.
        version: of its weights, stamped on the completions.
        prompts: of the whole call; `rows` say which ones are meant.
        rows: the completions to make.
        sampling: how.
        uniform_RL: the random numbers of each row.
        stop_texts: texts that end a row.
    """

    def __init__(
        self,
        lm: CachedLM,
        version: int,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[Row],
        sampling: Sampling,
        uniform_RL: Tensor,
        stop_texts: StopTexts | None = None,
    ) -> None:
        self.stop_texts = stop_texts
        self.lm, self.version, self.rows, self.sampling, self.device = lm, version, rows, sampling, lm.device
        self.uniform_RL = uniform_RL.to(self.device)
        self.stop_ids = torch.tensor(sorted(set(sampling.stop_ids)), dtype=torch.int64, device=self.device)
        self.ids_RL = torch.zeros(uniform_RL.shape, dtype=torch.int64, device=self.device)
        self.logp_RL = torch.zeros(uniform_RL.shape, device=self.device)
        self.alive_B = torch.arange(len(rows), device=self.device)
        self.drawn = self.ids_RL[:, 0]  # the newest token of each row that took one
        self._prefill([tuple(prompts[row.prompt]) for row in rows])

    def _prefill(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Compute each distinct prompt once, what all of them begin with once, and repeat the cache for the rows."""
        distinct = list(dict.fromkeys(prompts))
        widest = max(map(len, distinct))
        self.cache = self.lm.new_cache(widest + self.sampling.max_new_tokens)
        start = common(distinct) if self.lm.can_share_prefix(self.cache) else 0
        if len(distinct) > 1 and start >= MIN_PREFIX:
            ids, mask, positions = self._padded([distinct[0][:start]], start)
            self.lm(ids, mask, positions, self.cache)
            self.lm.select(self.cache, torch.zeros(len(distinct), dtype=torch.int64, device=self.device))
        else:
            start = 0
        ids, mask, positions = self._padded([prompt[start:] for prompt in distinct], widest - start)
        mask = torch.cat([mask.new_ones(len(distinct), start), mask], 1)
        logits = self.lm(ids, mask, positions + start, self.cache)
        place = {prompt: i for i, prompt in enumerate(distinct)}
        index = torch.tensor([place[prompt] for prompt in prompts], device=self.device)
        if len(distinct) < len(prompts):
            self.lm.select(self.cache, index)
        self.logits_BV, self.mask_BS, self.position_B = logits[index], mask[index], positions[index, -1] + start

    def _padded(self, rows: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, mask and positions `[rows, width]`, padded on the left."""
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)
        return ids.to(self.device), mask.to(self.device), positions.to(self.device)

    def run(self) -> Iterator[dict[Row, Completion]]:
        """Decode until no row is left, handing out after every token the rows that finished with it: often none."""
        for step in range(self.sampling.max_new_tokens):
            last = step + 1 == self.sampling.max_new_tokens
            luck_B, how = self.uniform_RL[self.alive_B, step], self.sampling
            token_B, logp_B = pick(self.logits_BV, how.temperature, luck_B, how.top_p, how.top_k)
            self.ids_RL[self.alive_B, step], self.logp_RL[self.alive_B, step] = token_B, logp_B
            self.drawn = token_B
            stop_B = torch.isin(token_B, self.stop_ids)
            done_B = stop_B | last
            length_B = torch.full_like(token_B, step + 1)
            ids_BL = self.ids_RL if self.stop_texts is None else self.ids_RL[self.alive_B]
            for i, end in ended(self.stop_texts, ids_BL, length_B, done_B).items():
                done_B[i] = stop_B[i] = True
                length_B[i] = end
            yield dict(self._finished(done_B, stop_B, length_B)) if done_B.any() else {}
            if done_B.all():
                return
            if done_B.any():
                token_B = self._drop(done_B, token_B)
            self._advance(token_B)

    def _finished(self, done_B: Tensor, stop_B: Tensor, length_B: Tensor) -> Iterator[tuple[Row, Completion]]:
        found = (each[done_B].tolist() for each in (self.alive_B, stop_B, length_B))
        for row, stopped, length in zip(*found, strict=True):
            ids_L, logp_L = self.ids_RL[row, :length].cpu().clone(), self.logp_RL[row, :length].cpu().clone()
            if not torch.isfinite(logp_L).all():
                raise RuntimeError(f"weights of version {self.version} give probabilities that are not finite numbers")
            yield self.rows[row], Completion(ids_L, logp_L, "stop" if stopped else "length", self.version)

    def _drop(self, done_B: Tensor, token_B: Tensor) -> Tensor:
        keep = (~done_B).nonzero()[:, 0]
        self.lm.select(self.cache, keep)
        self.alive_B, self.mask_BS, self.position_B = self.alive_B[keep], self.mask_BS[keep], self.position_B[keep]
        return token_B[keep]

    def _advance(self, token_B: Tensor) -> None:
        self.position_B = self.position_B + 1
        self.mask_BS = torch.cat([self.mask_BS, self.mask_BS.new_ones(len(token_B), 1)], 1)
        self.logits_BV = self.lm(token_B[:, None], self.mask_BS, self.position_B[:, None], self.cache)


def chunks(prompts: Sequence[Sequence[int]], n: int, new: int, max_rows: int, batch_tokens: int) -> Iterator[list[Row]]:
    """Rows to decode together: neighbours in length, samples of equal prompts side by side, longest first.

    Args:
        prompts: token ids.
        n: samples of each.
        new: tokens that a row may grow by.
        max_rows: rows of a chunk at most.
        batch_tokens: prompt and new tokens of a chunk at most, padding counted; one row is always allowed.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), tuple(prompts[i])))
    chunk: list[Row] = []
    for i in order:
        for j in range(n):
            longest = len(prompts[chunk[0].prompt]) if chunk else 0
            if chunk and (len(chunk) == max_rows or (len(chunk) + 1) * (longest + new) > batch_tokens):
                yield chunk
                chunk = []
            chunk.append(Row(i, j))
    if chunk:
        yield chunk
