"""What PPO does with scored rollouts: log-probs, advantages, then K epochs of clipped updates."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from tulu_lightning.core.advantages import moments, whiten
from tulu_lightning.core.aggregate import Aggregation, denominator, token_weights
from tulu_lightning.core.correction import Correction, Mismatch
from tulu_lightning.core.estimators import GAE, GroupAdvantage
from tulu_lightning.core.kl import Kl, kl_loss
from tulu_lightning.core.logprobs import TokenStats
from tulu_lightning.core.policy import ClippedPolicy, ClippedValue
from tulu_lightning.core.step_plan import mix_seed
from tulu_lightning.models.backbone import PackedLM
from tulu_lightning.models.heads import PackedValue
from tulu_lightning.models.lora import without_adapters
from tulu_lightning.rollout.experience import Experience, Group, Micro, advantages, has_signal, micro_batches
from tulu_lightning.rollout.together import ALONE, Together
from tulu_lightning.stages.ppo_metrics import Epochs
from tulu_lightning.stages.ppo_settings import Critic, Rollout
from tulu_lightning.stages.stage import Stage

__all__ = ["Learner"]


class Learner(Stage):
    """The part of `PPO` that comes after scoring; `PPO` sets what it reads."""

    advantage: GAE | GroupAdvantage
    aggregation: Aggregation
    correction: Correction
    critic: PackedValue | None
    critic_config: Critic | None
    entropy_coefficient: float
    epochs: int
    kl: Kl
    kl_coefficient: float
    micro_tokens: int
    mini_batches: int
    policy_loss: ClippedPolicy
    rollout: Rollout
    value_coefficient: float
    value_loss: ClippedValue
    _reference: list[PackedLM]
    advantage_std = 0.0
    together: Together = ALONE

    @torch.no_grad()
    def estimate(self, groups: Sequence[Group]) -> list[list[Experience]]:
        """Per mini-batch its micro-batches, with old and reference log-probs, values and whitened advantages.

        The packs are made here and used unchanged in every epoch, so that the first ratio is exactly 1.
        """
        parts = [range(i, len(groups), self.mini_batches) for i in range(self.mini_batches)]
        cut = [self._cut(groups, part) for part in parts]
        known = [self._known(micro) for micros in cut for micro in micros]
        penalty = self.kl_coefficient if self.kl.place == "reward" else 0.0
        known = self._whitened(advantages(known, self.advantage, penalty))
        rest = iter(known)
        return [[next(rest) for _ in micros] for micros in cut if micros]

    @property
    def one_pass(self) -> bool:
        """Whether the update's own forward gives the old log-probs: it is the only one, and nothing before it reads them.

        The ratio is 1 by construction then, and a step costs one forward less.
        """
        in_the_reward = self.kl.coefficient > 0 and self.kl.place == "reward"
        return self.epochs == self.mini_batches == 1 and self.critic_config is None and not in_the_reward

    @property
    def policy_learns(self) -> bool:
        """Whether the step trains the policy; while the critic warms up it does not."""
        return self.critic_config is None or self.step >= self.critic_config.warmup_steps

    def _cut(self, groups: Sequence[Group], part: Sequence[int]) -> list[Micro]:
        """Packs of one mini-batch; groups that teach nothing lie in packs of their own, which `_live` can leave out."""
        if not isinstance(self.advantage, GroupAdvantage):
            return micro_batches(groups, part, self.micro_tokens, self.place)
        kinds = ([i for i in part if has_signal(groups[i]) == signal] for signal in (True, False))
        return [micro for kind in kinds for micro in micro_batches(groups, kind, self.micro_tokens, self.place)]

    def _live(self, part: Sequence[Experience]) -> list[int]:
        """Places of the micro-batches with a gradient. The first at least: Adam moves on in a step without any, too."""
        if self.entropy_coefficient or (self.kl.coefficient and self.kl.place == "loss"):
            return list(range(len(part)))
        live = torch.tensor([float((e.advantages_N != 0).any()) for e in part])
        # On all ranks the same ones: sharded networks gather in each.
        return [i for i, alive in enumerate(self.reduce_sum(live).tolist()) if alive] or [0]

    def _whitened(self, known: Sequence[Experience]) -> list[Experience]:
        everything_N = torch.cat([e.advantages_N for e in known]) if known else torch.zeros(0)
        over = moments(everything_N, self.reduce_sum)
        self.advantage_std = over.std
        if not self.advantage.whiten_batch:
            return list(known)
        return [e._replace(advantages_N=whiten(e.advantages_N, over)) for e in known]

    def _known(self, micro: Micro) -> Experience:
        micro = self.trainer.strategy.batch_to_device(micro)
        nothing_N = torch.zeros_like(micro.sampler_N)
        known = Experience(
            micro=micro,
            old_N=nothing_N,
            reference_N=self._reference_logps(micro) if self.kl.coefficient else None,
            values_N=None if self.critic is None else self.critic(micro.pack),
            entropy_N=nothing_N,
            correction_N=nothing_N,
            weight_N=token_weights(micro.lengths_R, self.aggregation).to(nothing_N.device),
            advantages_N=nothing_N,
            returns_N=None,
            known=False,
        )
        return known if self.one_pass else self._with_old(known, self.model(*self._asked(micro), entropy=True))

    def _asked(self, micro: Micro) -> tuple[Any, float]:
        return micro.pack, self.rollout.temperature

    def _with_old(self, e: Experience, old: TokenStats) -> Experience:
        """With what the policy said of its tokens before any update."""
        assert old.entropy_N is not None
        old_N = old.logp_N.detach()
        correction_N = self.correction(old_N, e.micro.sampler_N)
        return e._replace(old_N=old_N, entropy_N=old.entropy_N.detach(), correction_N=correction_N, known=True)

    def _reference_logps(self, micro: Micro) -> Tensor:
        if self._reference:
            return self._reference[0](*self._asked(micro)).logp_N
        with without_adapters(self.model.lm):
            return self.model(*self._asked(micro)).logp_N

    # Updates ----------------------------------------------------------------------------------------------------

    def learn(self, experience: list[list[Experience]]) -> Epochs:
        """K epochs of mini-batches: the critic's update, then the policy's. With `one_pass`, completes the experience."""
        epochs = Epochs()
        optimizers: Any = self.optimizers()
        optimizer, critic_optimizer = (optimizers, None) if self.critic is None else optimizers
        for epoch in range(self.epochs):
            for part in self._shuffled(experience, epoch):
                tokens, responses = self._counts(part)
                if self.critic is not None:
                    epochs.critic_grad_norms.append(self._critic_update(part, tokens, critic_optimizer, epochs))
                if self.policy_learns:
                    whole = denominator(self.aggregation, tokens, responses, self.rollout.max_new_tokens)
                    epochs.grad_norms.append(self._policy_update(part, whole, optimizer, epochs))
        return epochs

    def seen(self, parts: Sequence[Sequence[Experience]]) -> list[Experience]:
        """Everything that was learned from, on the host and of all ranks, for metrics."""
        own: Any = [[e for e in part if e.micro.lengths_R] for part in parts]
        own = move_data_to_device(own, torch.device("cpu"))
        ranks = self.together.gather(own, f"metrics of step {self.step}")
        return [e for place in range(len(parts)) for rank in ranks for e in rank[place]]

    def _counts(self, part: Sequence[Experience]) -> list[float]:
        """Trained tokens and responses of a mini-batch, over all ranks."""
        own = [sum(e.old_N.numel() for e in part), sum(len(e.micro.lengths_R) for e in part)]
        return self.reduce_sum(torch.tensor(own, dtype=torch.float64)).tolist()

    def _shuffled(self, parts: Sequence[list[Experience]], epoch: int) -> list[list[Experience]]:
        generator = torch.Generator().manual_seed(mix_seed(self.rollout.seed, self.step, epoch))
        return [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]

    def _critic_update(self, part: Sequence[Experience], tokens: float, optimizer: Any, epochs: Epochs) -> float:
        assert self.critic is not None
        assert self.critic_config is not None
        for e in part:
            assert e.values_N is not None
            assert e.returns_N is not None
            terms = self.value_loss(self.critic(e.micro.pack), e.values_N, e.returns_N)
            self.backward_sum(self.value_coefficient * terms.loss_N.sum(), tokens)
            epochs.add_value(terms)
        return self.update(self.critic_config.optimizer, optimizer, self.critic.parameters(), "critic")

    def _policy_update(self, part: list[Experience], whole: float, optimizer: Any, epochs: Epochs) -> float:
        for i in self._live(part):
            bonus = self.entropy_coefficient > 0
            now = self.model(*self._asked(part[i].micro), entropy=bonus or not part[i].known)
            e = part[i] if part[i].known else self._with_old(part[i], now)
            part[i] = e
            terms = self.policy_loss(now.logp_N, e.old_N, e.advantages_N)
            loss_N = terms.loss_N * e.correction_N
            if self.kl.place == "loss" and e.reference_N is not None:
                assert self.kl.estimator != "k1"
                loss_N = loss_N + self.kl_coefficient * kl_loss(now.logp_N, e.reference_N, self.kl.estimator)
            if bonus:
                loss_N = loss_N - self.entropy_coefficient * now.entropy_N
            loss = (loss_N * e.weight_N).sum()
            self.backward_sum(loss, whole)
            epochs.add_policy(terms, float(loss.detach()) / whole)
        return self.update(self.optimizer, optimizer, self.model.parameters())


def sum_of(parts: Sequence[Mismatch]) -> Mismatch:
    """All of them together."""
    total = Mismatch()
    for part in parts:
        total = total.plus(part)
    return total
