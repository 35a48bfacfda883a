"""PPO with verifiable rewards (Tülu 3, section 6): collect, score, estimate, K epochs of two clipped losses."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from tulu_lightning.assets.models import load_tokenizer, resolve_model
from tulu_lightning.core.advantages import moments, whiten
from tulu_lightning.core.policy import ClippedPolicy, ClippedValue
from tulu_lightning.core.settings import require
from tulu_lightning.core.step_plan import mix_seed
from tulu_lightning.data.prompts import PromptData
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.models.heads import PackedValue, has_reward_head
from tulu_lightning.models.limits import check_prompts
from tulu_lightning.models.lora import without_adapters
from tulu_lightning.models.weights import plain_weights
from tulu_lightning.rollout.engine import Engine
from tulu_lightning.rollout.experience import Experience, Group, Micro, estimate, micro_batches, reward
from tulu_lightning.rollout.scoring import score_all
from tulu_lightning.stages.checks import warn_of_bf16_weights
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.ppo_metrics import Epochs, step_metrics, table
from tulu_lightning.stages.ppo_settings import Critic, Reward, Rollout
from tulu_lightning.stages.stage import Stage
from tulu_lightning.types import PromptBatch, Sampling

__all__ = ["PPO", "Critic", "Reward", "Rollout"]


class PPO(Stage):
    """One step: n responses to each prompt from an engine that provably holds the present weights, a verdict on each,
    then `epochs` passes of critic and policy updates over them.

    The policy's learning rate is a function of the step, the critic's warm-up included: with `critic.warmup_steps` its
    first update runs at the rate which its schedule has reached by then, not at the peak.

    Args:
        backbone: the policy's start, and the frozen reference.
        optimizer: the policy's.
        critic: the value network.
        rollout: sampling.
        reward: what a verdict is worth.
        policy_loss: clipped surrogate.
        value_loss: clipped squared error.
        value_coefficient: weight of the value loss (the paper's c1; it matters only together with clipping, since the
            critic has its own optimiser).
        gamma: discount.
        lam: λ of GAE.
        epochs: passes over each rollout batch (K).
        mini_batches: updates per pass.
        micro_tokens: limit of one pack, in tokens.

    Raises:
        InputError: a number out of its range, a critic with another tokenizer, or one that starts from a classifier
            that is no reward model (`models.heads.has_reward_head`).
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: AdamW,
        critic: Critic,
        rollout: Rollout,
        reward: Reward | None = None,
        policy_loss: ClippedPolicy | None = None,
        value_loss: ClippedValue | None = None,
        value_coefficient: float = 0.1,
        gamma: float = 1.0,
        lam: float = 0.95,
        epochs: int = 4,
        mini_batches: int = 1,
        micro_tokens: int = 4096,
    ) -> None:
        for name, count in (("epochs", epochs), ("mini_batches", mini_batches), ("micro_tokens", micro_tokens)):
            require(count >= 1, f"model.{name}", count, "Use at least 1.")
        for name, share in (("gamma", gamma), ("lam", lam)):
            require(0 <= share <= 1, f"model.{name}", share, "It lies between 0 and 1.")
        remedy = "It must be above 0."
        require(0 < value_coefficient < float("inf"), "model.value_coefficient", value_coefficient, remedy)
        super().__init__(backbone, optimizer)
        self.critic_config, self.rollout, self.reward = critic, rollout, reward or Reward()
        self.policy_loss, self.value_loss = policy_loss or ClippedPolicy(), value_loss or ClippedValue()
        self.value_coefficient, self.gamma, self.lam = value_coefficient, gamma, lam
        self.epochs, self.mini_batches, self.micro_tokens = epochs, mini_batches, micro_tokens
        self.critic_folder = os.path.realpath(resolve_model(critic.path)) if critic.path else self.folder
        self.tokenizer = load_tokenizer(self.folder)
        self._check_critic_tokenizer()
        self._critic_goes_on = has_reward_head(self.critic_folder, critic.layers)
        self.critic: PackedValue | None = None
        self.engine: Engine | None = None
        self._reference: list[PackedLM] = []  # in a list: not a submodule, so neither trained nor checkpointed

    def _check_critic_tokenizer(self) -> None:
        if self.critic_folder == self.folder:
            return
        if load_tokenizer(self.critic_folder).get_vocab() != self.tokenizer.get_vocab():
            raise InputError(
                "critic.path",
                f"{self.critic_folder} has another tokenizer than the policy {self.folder}",
                "The critic reads the policy's token ids: give one with the same tokenizer.",
            )

    # Building ---------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Policy, critic and the frozen reference."""
        super().configure_model()
        if self.critic is None:
            config = replace(self.backbone, path=self.critic_folder, layers=self.critic_config.layers)
            head = "the reward model's head goes on" if self._critic_goes_on else "a language model, with a fresh head"
            rank_zero_info(f"PPO's critic starts from {self.critic_folder}: {head}")
            self.critic = self.sharded(PackedValue(config, self.critic_folder), config)
            if self.backbone.lora is None:  # else the policy without its adapters is the reference
                self._reference = [PackedLM(self.backbone, self.folder).requires_grad_(False)]

    def settings(self) -> dict[str, Any]:
        """Critic, sampling, reward, losses; `micro_tokens` only cuts."""
        names = ("rollout", "reward", "policy_loss", "value_loss", "value_coefficient", "gamma", "lam", "epochs")
        own = {name: getattr(self, name) for name in (*names, "mini_batches")}
        critic = replace(self.critic_config, path=None)  # a path says nothing of the weights behind it
        return {**own, "critic": critic, "critic start weights": self.digest_of(self.critic_folder)}

    def configure_optimizers(self) -> Any:
        """Two: the policy's and the critic's."""
        assert self.critic is not None
        return [
            self.optimizer.build(self.model.parameters()),
            self.critic_config.optimizer.build(self.critic.parameters()),
        ]

    def setup(self, stage: str) -> None:
        """Refuse several processes, too."""
        super().setup(stage)
        warn_of_bf16_weights(self.backbone, self.critic_config.optimizer.lr)
        if self.trainer.world_size > 1:
            raise InputError("trainer.devices", f"is {self.trainer.world_size}", "PPO runs in one process for now.")

    def configure_callbacks(self) -> list[Any]:
        """Refuse sharding, on one process too: critic, reference and engine expect whole weights."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            remedy = "Leave it at auto: PPO runs in one process for now."
            raise InputError("trainer.strategy", f"is {type(self.trainer.strategy).__name__}", remedy)
        return super().configure_callbacks()

    def check_data(self, data: Any) -> None:
        """Prompts and their responses must fit the policy and the critic, too."""
        if not isinstance(data, PromptData):
            raise InputError("data", f"is {type(data).__name__}", "PPO samples from prompts: use PromptData.")
        for folder in dict.fromkeys((self.folder, self.critic_folder)):
            check_prompts(data.prompts, self.rollout.max_new_tokens, folder)

    def on_fit_start(self) -> None:
        """Build the engine; the `RolloutRefresh` callback keeps it current."""
        for reference in self._reference:
            reference.to(self.device)
        if self.engine is None:
            self.engine = self.make_engine(getattr(torch, self.rollout.engine_dtype))

    def refresh(self) -> None:
        """Hand the present weights to the engine, stamped with the number of finished steps."""
        assert self.engine is not None
        self.engine.refresh(plain_weights(self.model.lm), self.step)

    # The step ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One rollout batch: collect, score, estimate, learn."""
        clock = [time.perf_counter()]
        groups = self.collect(batch)
        clock.append(time.perf_counter())
        groups = self.score(groups)
        clock.append(time.perf_counter())
        experience = self.estimate(groups)
        clock.append(time.perf_counter())
        epochs = self.learn(experience)
        clock.append(time.perf_counter())
        phases = ("generate", "score", "logprobs", "update")
        seconds = {f"seconds_{name}": clock[i + 1] - clock[i] for i, name in enumerate(phases)}
        everything = [e for part in experience for e in part]
        self.samples = table(groups, everything, self.tokenizer)
        self.finish_step(
            {
                **step_metrics(groups, everything, epochs),
                **seconds,
                "advantage_std": self._advantage_std,
                "version": float(self.engine.version if self.engine else -1),
            }
        )

    def collect(self, batch: PromptBatch) -> list[Group]:
        """Sample responses, and refuse weights that are not the present ones.

        Raises:
            RuntimeError: the engine's version is not the number of finished steps.
        """
        assert self.engine is not None
        if self.engine.version != self.step:
            raise RuntimeError(
                f"the engine holds the weights of step {self.engine.version}, training is at step {self.step}: "
                "add the RolloutRefresh callback to the Trainer"
            )
        sampling = Sampling(self.rollout.max_new_tokens, self.rollout.temperature, self.stop_ids())
        seed = mix_seed(self.rollout.seed, self.step)
        prompts = [p.ids for p in batch.prompts]
        sampled = self.engine.generate(prompts, self.rollout.samples_per_prompt, sampling, seed)
        return [Group(p, tuple(c), (), ()) for p, c in zip(batch.prompts, sampled, strict=True)]

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """A verdict and a terminal reward for each response."""
        result = []
        for group in groups:
            verdicts = tuple(score_all([(group.prompt, c) for c in group.completions], self.tokenizer))
            pairs = zip(verdicts, group.completions, strict=True)
            rewards = tuple(reward(v, c, self.reward.right, self.reward.no_stop) for v, c in pairs)
            result.append(group._replace(verdicts=verdicts, rewards=rewards))
        return result

    @torch.no_grad()
    def estimate(self, groups: Sequence[Group]) -> list[list[Experience]]:
        """Per mini-batch its micro-batches, with old and reference log-probs, values and whitened advantages.

        The packs are made here and used unchanged in every epoch, so that the first ratio is exactly 1.
        """
        parts = [range(i, len(groups), self.mini_batches) for i in range(min(self.mini_batches, len(groups)))]
        parts = [[self._estimate(m) for m in micro_batches(groups, part, self.micro_tokens)] for part in parts]
        over = moments(torch.cat([e.advantages_N for part in parts for e in part]), self.reduce_sum)
        self._advantage_std = over.std
        return [[e._replace(advantages_N=whiten(e.advantages_N, over)) for e in part] for part in parts]

    def _estimate(self, micro: Micro) -> Experience:
        assert self.critic is not None
        micro = self.trainer.strategy.batch_to_device(micro)
        old = self.model(micro.pack, self.rollout.temperature, entropy=True)
        reference_N = self._reference_logps(micro)
        values_N = self.critic(micro.pack)
        assert old.entropy_N is not None
        beta = self.reward.kl_coefficient
        return estimate(micro, old.logp_N, reference_N, values_N, old.entropy_N, beta, self.gamma, self.lam)

    def _reference_logps(self, micro: Micro) -> Tensor:
        if self._reference:
            return self._reference[0](micro.pack, self.rollout.temperature).logp_N
        with without_adapters(self.model.lm):
            return self.model(micro.pack, self.rollout.temperature).logp_N

    def learn(self, experience: Sequence[Sequence[Experience]]) -> Epochs:
        """K epochs of mini-batches: the critic's update, then the policy's."""
        epochs = Epochs()
        optimizer, critic_optimizer = self.optimizers()  # type: ignore[misc]
        for epoch in range(self.epochs):
            for part in self._shuffled(experience, epoch):
                tokens = float(self.reduce_sum(torch.tensor([float(sum(e.old_N.numel() for e in part))])))
                epochs.critic_grad_norms.append(self._critic_update(part, tokens, critic_optimizer, epochs))
                if self.step >= self.critic_config.warmup_steps:
                    epochs.grad_norms.append(self._policy_update(part, tokens, optimizer, epochs))
        return epochs

    def _shuffled(self, parts: Sequence[Sequence[Experience]], epoch: int) -> list[Sequence[Experience]]:
        generator = torch.Generator().manual_seed(mix_seed(self.rollout.seed, self.step, epoch))
        return [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]

    def _critic_update(self, part: Sequence[Experience], tokens: float, optimizer: Any, epochs: Epochs) -> float:
        assert self.critic is not None
        for e in part:
            terms = self.value_loss(self.critic(e.micro.pack), e.values_N, e.returns_N)
            self.backward_sum(self.value_coefficient * terms.loss_N.sum(), tokens)
            epochs.add_value(terms)
        return self.update(self.critic_config.optimizer, optimizer, self.critic.parameters(), "critic")

    def _policy_update(self, part: Sequence[Experience], tokens: float, optimizer: Any, epochs: Epochs) -> float:
        for e in part:
            logp_N = self.model(e.micro.pack, self.rollout.temperature).logp_N
            terms = self.policy_loss(logp_N, e.old_N, e.advantages_N)
            self.backward_sum(terms.loss_N.sum(), tokens)
            epochs.add_policy(terms)
        return self.update(self.optimizer, optimizer, self.model.parameters())
