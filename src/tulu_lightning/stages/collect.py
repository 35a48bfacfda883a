"""One step's rollouts: sample, score, and with dynamic sampling go on until enough groups carry a signal."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from tulu_lightning.core.overlong import Overlong
from tulu_lightning.core.step_plan import mix_seed
from tulu_lightning.rollout.engine import Engine
from tulu_lightning.rollout.experience import Group, has_signal, judged
from tulu_lightning.rollout.scoring import Scorer
from tulu_lightning.rollout.together import ALONE, Together, in_order, share_of
from tulu_lightning.stages.ppo_settings import DynamicSampling, Reward, Rollout
from tulu_lightning.types import Check, Completion, Prompt, PromptBatch, Sampling, Verdict

__all__ = ["Collected", "Collector", "further", "pack_up", "unpack"]


class Collected(NamedTuple):
    """The rollouts of one step."""

    step: int
    version: int
    """Version of the weights that made all of them."""
    groups: tuple[Group, ...]
    """Those that are learned from."""
    raw: tuple[Group, ...]
    """All that were sampled, in order: the step's own prompts, then those of each refill."""
    refills: int
    seconds: dict[str, float]
    """What `generate` and `score` took."""


@dataclass
class Collector:
    """Samples and scores the prompts of a step."""

    rollout: Rollout
    reward: Reward
    overlong: Overlong
    dynamic: DynamicSampling | None
    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    prompts: Sequence[Prompt] = field(default_factory=tuple)
    """All prompts of the run; refills are drawn from them."""
    least: int = 1
    """Responses that a group must have left to be learned from: 2 where they are each other's baseline."""
    together: Together = ALONE
    """The ranks that the prompts of a step are divided over."""
    one_engine: bool = False
    """Whether the first rank samples for all; else each does its share."""

    @property
    def sampling(self) -> Sampling:
        """What the engine is asked for."""
        own = self.rollout
        return Sampling(own.max_new_tokens, own.temperature, self.stop_ids, own.top_p, own.top_k)

    def collect(self, engine: Engine, batch: PromptBatch, version: int) -> Collected:
        """Rollouts of one step, a function of its number, the weights and the settings alone.

        Args:
            engine: holds the weights.
            batch: the step's own prompts.
            version: of the weights that must make them.

        Raises:
            RuntimeError: the engine holds, or a response was made by, weights of another version.
            EngineError: the engine died.
        """
        raw: list[Group] = []
        seconds = {"generate": 0.0, "score": 0.0}
        prompts, refills = batch.prompts, 0
        while prompts:
            raw += self._round(engine, batch.step, prompts, len(raw), version, seconds)
            missing = len(batch.prompts) - sum(map(has_signal, raw))
            if self.dynamic is None or missing <= 0 or refills == self.dynamic.max_refills:
                break
            refills += 1
            taken = {group.prompt.row for group in raw}
            prompts = further(self.prompts, taken, missing, mix_seed(self.rollout.seed, batch.step, refills, 1))
        groups = tuple(g for g in raw if len(g.kept) >= self.least and (self.dynamic is None or has_signal(g)))
        return Collected(batch.step, version, groups, tuple(raw), refills, seconds)

    def _round(
        self, engine: Engine, step: int, prompts: Sequence[Prompt], first: int, version: int, seconds: dict[str, float]
    ) -> list[Group]:
        _check_version(engine.version, version, step)
        started = time.perf_counter()
        numbered = [(first + place, prompt) for place, prompt in enumerate(prompts)]
        rank, ranks = self.together.rank, self.together.ranks
        own = share_of(numbered, rank, ranks)
        what = f"rollouts of step {step}"
        if self.one_engine:  # which of them are sampled where changes nothing: a sample's seed is its prompt's number
            asked = numbered if self.together.first else []
            sampled = self.together.run(lambda: self._sampled(engine, asked, step, version), what)
            sampled = share_of(self.together.gather(sampled, what)[0], rank, ranks)
        else:
            sampled = self.together.run(lambda: self._sampled(engine, own, step, version), what)
        middle = time.perf_counter()
        groups = [Group(prompt, tuple(c)) for (_, prompt), c in zip(own, sampled, strict=True)]
        groups = self.together.run(lambda: self.score(groups), f"scoring of step {step}")
        groups = in_order(self.together.gather(groups, what))
        seconds["generate"] += middle - started
        seconds["score"] += time.perf_counter() - middle
        return groups

    def _sampled(
        self, engine: Engine, numbered: Sequence[tuple[int, Prompt]], step: int, version: int
    ) -> list[list[Completion]]:
        """Responses to some of a round's prompts, by their numbers in the step."""
        if not numbered:
            return []
        sampled = engine.generate(
            [prompt.ids for _, prompt in numbered],
            self.rollout.samples_per_prompt,
            self.sampling,
            mix_seed(self.rollout.seed, step),
            keys=[number for number, _ in numbered],
        )
        for completion in (c for group in sampled for c in group):
            _check_version(completion.version, version, step)
        return sampled

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """A verdict and a terminal reward for each response; all of them in one go, as slow ones run side by side."""
        pairs = [(group.prompt, c) for group in groups for c in group.completions]
        verdicts = iter(self.scorer.score(pairs, self.tokenizer))
        return [
            judged(g, [next(verdicts) for _ in g.completions], self.reward.right, self.overlong, self._longest)
            for g in groups
        ]

    @property
    def _longest(self) -> int:
        return self.rollout.max_new_tokens


def _check_version(found: int, wanted: int, step: int) -> None:
    if found != wanted:
        samples = "" if wanted == step else f" and samples from those of step {wanted}"
        raise RuntimeError(
            f"the engine holds the weights of step {found}, training is at step {step}{samples}: "
            "add the RolloutRefresh callback to the Trainer"
        )


def further(prompts: Sequence[Prompt], taken: Collection[int], count: int, seed: int) -> tuple[Prompt, ...]:
    """Up to `count` prompts, in an order that only the seed decides, without the rows that are taken."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    return tuple([prompts[i] for i in order if prompts[i].row not in taken][:count])


def pack_up(collected: Collected) -> dict[str, Any]:
    """Rollouts as plain values and tensors, for a checkpoint."""
    kept = [any(group is other for other in collected.groups) for group in collected.raw]
    groups = [
        {
            "prompt": {**g.prompt._asdict(), "ids": list(g.prompt.ids), "checks": [tuple(k) for k in g.prompt.checks]},
            "completions": [tuple(c) for c in g.completions],
            "verdicts": [tuple(v) for v in g.verdicts],
            "rewards": list(g.rewards),
            "trained": list(g.trained),
        }
        for g in collected.raw
    ]
    own = {"step": collected.step, "version": collected.version, "refills": collected.refills}
    return {**own, "seconds": collected.seconds, "kept": kept, "groups": groups}


def unpack(state: Mapping[str, Any]) -> Collected:
    """What `pack_up` was given."""
    raw = tuple(_group(group) for group in state["groups"])
    groups = tuple(group for group, kept in zip(raw, state["kept"], strict=True) if kept)
    return Collected(state["step"], state["version"], groups, raw, state["refills"], dict(state["seconds"]))


def _group(state: Mapping[str, Any]) -> Group:
    prompt = state["prompt"]
    checks = tuple(Check(*check) for check in prompt["checks"])
    return Group(
        Prompt(**{**prompt, "ids": tuple(prompt["ids"]), "checks": checks}),
        tuple(Completion(*completion) for completion in state["completions"]),
        tuple(Verdict(*verdict) for verdict in state["verdicts"]),
        tuple(state["rewards"]),
        tuple(state["trained"]),
    )
