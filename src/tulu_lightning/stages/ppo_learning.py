"""What PPO does with scored rollouts: log-probs, advantages, then K epochs of clipped updates."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tulu_lightning.core.advantages import moments, whiten
from tulu_lightning.core.aggregate import Aggregation, denominator, token_weights
from tulu_lightning.core.correction import Correction, Mismatch
from tulu_lightning.core.estimators import GAE, GroupAdvantage
from tulu_lightning.core.kl import Kl, kl_loss
from tulu_lightning.core.policy import ClippedPolicy, ClippedValue
from tulu_lightning.core.step_plan import mix_seed
from tulu_lightning.models.backbone import PackedLM
from tulu_lightning.models.heads import PackedValue
from tulu_lightning.models.lora import without_adapters
from tulu_lightning.rollout.experience import Experience, Group, Micro, advantages, micro_batches
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
    mismatch = Mismatch()

    @torch.no_grad()
    def estimate(self, groups: Sequence[Group]) -> list[list[Experience]]:
        """Per mini-batch its micro-batches, with old and reference log-probs, values and whitened advantages.

        The packs are made here and used unchanged in every epoch, so that the first ratio is exactly 1.
        """
        parts = [range(i, len(groups), self.mini_batches) for i in range(self.mini_batches)]
        cut = [micro_batches(groups, part, self.micro_tokens) for part in parts]
        known = [self._known(micro) for micros in cut for micro in micros]
        penalty = self.kl_coefficient if self.kl.place == "reward" else 0.0
        known = self._whitened(advantages(known, self.advantage, penalty))
        self.mismatch = sum_of([self.correction.mismatch(e.old_N, e.micro.sampler_N) for e in known])
        rest = iter(known)
        return [[next(rest) for _ in micros] for micros in cut if micros]

    def _whitened(self, known: Sequence[Experience]) -> list[Experience]:
        everything_N = torch.cat([e.advantages_N for e in known]) if known else torch.zeros(0)
        over = moments(everything_N, self.reduce_sum)
        self.advantage_std = over.std
        if not self.advantage.whiten_batch:
            return list(known)
        return [e._replace(advantages_N=whiten(e.advantages_N, over)) for e in known]

    def _known(self, micro: Micro) -> Experience:
        micro = self.trainer.strategy.batch_to_device(micro)
        old = self.model(micro.pack, self.rollout.temperature, entropy=True)
        assert old.entropy_N is not None
        device = old.logp_N.device
        return Experience(
            micro=micro,
            old_N=old.logp_N,
            reference_N=self._reference_logps(micro) if self.kl.coefficient else None,
            values_N=None if self.critic is None else self.critic(micro.pack),
            entropy_N=old.entropy_N,
            correction_N=self.correction(old.logp_N, micro.sampler_N),
            weight_N=token_weights(micro.lengths_R, self.aggregation).to(device),
            advantages_N=torch.zeros_like(old.logp_N),
            returns_N=None,
        )

    def _reference_logps(self, micro: Micro) -> Tensor:
        if self._reference:
            return self._reference[0](micro.pack, self.rollout.temperature).logp_N
        with without_adapters(self.model.lm):
            return self.model(micro.pack, self.rollout.temperature).logp_N

    # Updates ----------------------------------------------------------------------------------------------------

    def learn(self, experience: Sequence[Sequence[Experience]]) -> Epochs:
        """K epochs of mini-batches: the critic's update, then the policy's."""
        epochs = Epochs()
        optimizers: Any = self.optimizers()
        optimizer, critic_optimizer = (optimizers, None) if self.critic is None else optimizers
        for epoch in range(self.epochs):
            for part in self._shuffled(experience, epoch):
                tokens, responses = self._counts(part)
                if self.critic is not None:
                    epochs.critic_grad_norms.append(self._critic_update(part, tokens, critic_optimizer, epochs))
                if self.critic_config is None or self.step >= self.critic_config.warmup_steps:
                    whole = denominator(self.aggregation, tokens, responses, self.rollout.max_new_tokens)
                    epochs.grad_norms.append(self._policy_update(part, whole, optimizer, epochs))
        return epochs

    def _counts(self, part: Sequence[Experience]) -> list[float]:
        """Trained tokens and responses of a mini-batch, over all ranks."""
        own = [sum(e.old_N.numel() for e in part), sum(len(e.micro.lengths_R) for e in part)]
        return self.reduce_sum(torch.tensor(own, dtype=torch.float64)).tolist()

    def _shuffled(self, parts: Sequence[Sequence[Experience]], epoch: int) -> list[Sequence[Experience]]:
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

    def _policy_update(self, part: Sequence[Experience], whole: float, optimizer: Any, epochs: Epochs) -> float:
        for e in part:
            now = self.model(e.micro.pack, self.rollout.temperature, entropy=self.entropy_coefficient > 0)
            terms = self.policy_loss(now.logp_N, e.old_N, e.advantages_N)
            loss_N = terms.loss_N * e.correction_N
            if self.kl.place == "loss" and e.reference_N is not None:
                assert self.kl.estimator != "k1"
                loss_N = loss_N + self.kl_coefficient * kl_loss(now.logp_N, e.reference_N, self.kl.estimator)
            if self.entropy_coefficient > 0:
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
