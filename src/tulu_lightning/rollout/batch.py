"""Rows of a section, sampled token by token; a row that finishes leaves its slot to one that waits."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tulu_lightning.rollout.cached_attention import Slots
from tulu_lightning.rollout.llama import Causal, LlamaLM
from tulu_lightning.rollout.plan import Job, Row, Section
from tulu_lightning.rollout.sampling import pick
from tulu_lightning.rollout.step_attention import StepAttention
from tulu_lightning.rollout.stop_texts import StopTexts, ended
from tulu_lightning.types import Completion, Sampling

__all__ = ["Batch"]

PREFILL_TOKENS = 4096
"""Tokens of prompts that are computed together at most (a longer prompt alone); bounds what their layers hold."""
WAIT = 8
"""Prompts wait until an eighth of the slots is free, so that several are computed together."""
MIN_PREFIX = 8
"""Tokens that all prompts must begin with before it pays to compute them apart."""


class Batch:
    """One section of a call. Axis B: the running rows, in slots 0 to B - 1.

    Args:
        lm: the model.
        version: of its weights, stamped on the completions.
        section: what to make.
        sampling: how.
        uniforms: gives the random numbers [rows, max_new_tokens] of rows.
        stop_texts: texts that end a row.
    """

    def __init__(
        self,
        lm: LlamaLM,
        version: int,
        section: Section,
        sampling: Sampling,
        uniforms: Callable[[Sequence[Row]], Tensor],
        stop_texts: StopTexts | None = None,
    ) -> None:
        self.stop_texts = stop_texts
        self.lm, self.version, self.section, self.sampling, self.uniforms = lm, version, section, sampling, uniforms
        self.waiting = deque(section.jobs)
        device, new = lm.device, sampling.max_new_tokens

        def room(slots: int, places: int) -> Slots:
            return Slots((len(lm.layers), slots, lm.key_heads, places, lm.width), lm.dtype, device)

        self.own, self.shared = room(section.slots, section.places), room(section.groups, section.shared_places)
        self.rows: list[Row] = []
        self.drawn = torch.zeros(0, dtype=torch.int64)  # the newest token of each row that took one
        self.group_B: list[int] = []  # slot of each row's shared tokens
        self.size_P: list[int] = []  # tokens in each slot of shared tokens
        self.filled_B = torch.zeros(section.slots, dtype=torch.int64, device=device)  # tokens of its own
        self.position_B, self.step_B, self.last_B = (torch.zeros_like(self.filled_B) for _ in range(3))
        self.uniform_BL = torch.zeros(section.slots, new, device=device)
        self.ids_BL = torch.zeros(section.slots, new, dtype=torch.int64, device=device)
        self.logp_BL = torch.zeros(section.slots, new, device=device)
        self.stop_ids = torch.tensor(sorted(set(sampling.stop_ids)), dtype=torch.int64, device=device)
        self.prefix = section.prefix if section.prefix >= MIN_PREFIX else 0
        self.prefix_kv: Tensor | None = None
        if self.prefix:
            causal = self._prefill([section.jobs[0].ids[: self.prefix]], None)[0]
            self.prefix_kv = causal.transpose(2, 3).contiguous()
            if section.share == "all":
                self.shared.fill(0, 0, causal)
                self.size_P = [self.prefix]

    def run(self) -> Iterator[dict[Row, Completion]]:
        """Decode until no row is left, handing out after every token the rows that finished with it: often none."""
        while self.waiting or self.rows:
            jobs = self._next_jobs()
            if jobs:
                yield from self._sample(self._admit(jobs), first=len(self.rows) - sum(len(job.rows) for job in jobs))
            if self.rows:
                yield from self._sample(self._decode(), first=0)

    # -- prompts --

    def _next_jobs(self) -> list[Job]:
        """Waiting jobs for the free slots."""
        jobs, tokens, free = list[Job](), 0, self.section.slots - len(self.rows)
        groups = self.section.groups - len(self.size_P) if self.section.share == "job" else free
        if self.rows and free < self.section.slots / WAIT:
            return jobs
        while self.waiting and groups and len(self.waiting[0].rows) <= free:
            length = len(self.waiting[0].ids) - self.prefix
            if jobs and tokens + length > PREFILL_TOKENS:
                break
            jobs.append(self.waiting.popleft())
            tokens, free, groups = tokens + length, free - len(jobs[-1].rows), groups - 1
        return jobs

    def _prefill(self, parts: Sequence[Sequence[int]], prefix: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values of token runs, and the logits after the last token of each."""
        causal = Causal(self.lm, [len(part) for part in parts], prefix, keep=True)
        start = 0 if prefix is None else self.prefix
        ids_T = torch.tensor([token for part in parts for token in part], device=self.lm.device)
        places = [torch.arange(start, start + len(part), device=self.lm.device) for part in parts]
        hidden_TD = self.lm.hidden(ids_T, torch.cat(places), causal)
        last = torch.tensor([end - 1 for _, end in causal.bounds], device=self.lm.device)
        assert causal.kv is not None
        return causal.kv, self.lm.logits(hidden_TD[last])

    def _admit(self, jobs: Sequence[Job]) -> Tensor:
        """Compute prompts and give their rows the next slots; the logits after the prompt, a row each."""
        parts = [job.ids[self.prefix :] for job in jobs]
        kv, logits_JV = self._prefill(parts, self.prefix_kv)
        ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
        for job, part, end in zip(jobs, parts, ends, strict=True):
            self._place(job, kv[:, :, end - len(part) : end])
        return logits_JV.repeat_interleave(torch.tensor([len(job.rows) for job in jobs], device=self.lm.device), 0)

    def _place(self, job: Job, kv: Tensor) -> None:
        """One job's keys and values to where its rows read them."""
        start, end, tokens = len(self.rows), len(self.rows) + len(job.rows), kv.shape[2]
        if self.section.share == "job":
            group = len(self.size_P)
            self.size_P.append(len(job.ids))
            if self.prefix_kv is not None:
                self.shared.fill(group, 0, self.prefix_kv.transpose(2, 3))
            self.shared.fill(group, self.prefix, kv)
            tokens = 0
        else:
            group, skip = 0, self.prefix if self.section.share == "none" else 0
            for slot in range(start, end):
                if skip and self.prefix_kv is not None:
                    self.own.fill(slot, 0, self.prefix_kv.transpose(2, 3))
                self.own.fill(slot, skip, kv)
            tokens += skip
        self.rows += job.rows
        self.group_B += [group] * len(job.rows)
        self.filled_B[start:end], self.position_B[start:end], self.step_B[start:end] = tokens, len(job.ids), 0
        self.uniform_BL[start:end] = self.uniforms(job.rows).to(self.lm.device)

    # -- one token --

    def _sample(self, logits_BV: Tensor, first: int) -> Iterator[dict[Row, Completion]]:
        """One token of each row from slot `first` on; hands out and removes those that are done."""
        slots = torch.arange(first, len(self.rows), device=self.lm.device)
        step_B, sampling = self.step_B[slots], self.sampling
        token_B, logp_B = self._pick(logits_BV, self.uniform_BL[slots, step_B])
        self.ids_BL[slots, step_B], self.logp_BL[slots, step_B] = token_B, logp_B
        self.drawn = token_B
        self.last_B[slots], self.step_B[slots] = token_B, step_B + 1
        stop_B = torch.isin(token_B, self.stop_ids)
        done_B = stop_B | (step_B + 1 == sampling.max_new_tokens)
        ends = ended(self.stop_texts, self.ids_BL[first : len(self.rows)], step_B + 1, done_B)
        done = sorted({*done_B.nonzero()[:, 0].tolist(), *ends})
        yield {self.rows[first + i]: self._completion(first + i, bool(stop_B[i]), ends.get(i)) for i in done}
        if done:
            self._remove([first + i for i in done])

    def _pick(self, logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        how = self.sampling
        if self.lm.compiled is not None and how.top_p == 1 and not how.top_k:
            return self.lm.compiled.draw(logits_BV, how.temperature, uniform_B)
        return pick(logits_BV, how.temperature, uniform_B, how.top_p, how.top_k)

    def _completion(self, slot: int, stopped: bool, end: int | None) -> Completion:
        length, stopped = end or int(self.step_B[slot]), stopped or end is not None
        ids_L, logp_L = self.ids_BL[slot, :length].cpu().clone(), self.logp_BL[slot, :length].cpu().clone()
        if not torch.isfinite(logp_L).all():
            raise RuntimeError(f"weights of version {self.version} give probabilities that are not finite numbers")
        return Completion(ids_L, logp_L, "stop" if stopped else "length", self.version)

    def _remove(self, slots: Sequence[int]) -> None:
        """Close the gaps with the last rows, and likewise those of shared prompts that nobody reads any more."""
        for slot in reversed(slots):
            last = len(self.rows) - 1
            if slot < last:
                self.own.move(last, slot, int(self.filled_B[last]))
                self.rows[slot], self.group_B[slot] = self.rows[last], self.group_B[last]
                for state in (
                    self.filled_B,
                    self.position_B,
                    self.step_B,
                    self.last_B,
                    self.uniform_BL,
                    self.ids_BL,
                    self.logp_BL,
                ):
                    state[slot] = state[last]
            del self.rows[last], self.group_B[last]
        if self.section.share == "job":
            for group in reversed(range(len(self.size_P))):
                if group not in self.group_B:
                    self._remove_group(group)

    def _remove_group(self, group: int) -> None:
        last = len(self.size_P) - 1
        if group < last:
            self.shared.move(last, group, self.size_P[last])
            self.size_P[group] = self.size_P[last]
            self.group_B = [group if each == last else each for each in self.group_B]
        self.size_P.pop()

    def _decode(self) -> Tensor:
        """Logits after the last token of each running row."""
        count = len(self.rows)
        attend = StepAttention(self.lm, self.own, self.shared, self.filled_B[:count], self.group_B, self.size_P)
        hidden_BD = self.lm.hidden(self.last_B[:count], self.position_B[:count], attend)
        self.filled_B[:count] += 1
        self.position_B[:count] += 1
        return self.lm.logits(hidden_BD)
