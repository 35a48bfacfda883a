"""PPO with verifiable rewards (Tülu 3, section 6), and GRPO and its kin: collect, score, estimate, K epochs of updates."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from tulu_lightning.assets.models import load_tokenizer, resolve_model
from tulu_lightning.checkpoints.identity import config_digest
from tulu_lightning.core.aggregate import Aggregation
from tulu_lightning.core.correction import Correction
from tulu_lightning.core.estimators import GAE, Advantage, needs_critic
from tulu_lightning.core.kl import Kl, adapted
from tulu_lightning.core.overlong import Overlong
from tulu_lightning.core.policy import ClippedPolicy, ClippedValue
from tulu_lightning.data.prompts import PromptData
from tulu_lightning.errors import InputError, RunStopped
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.models.heads import PackedValue, has_reward_head
from tulu_lightning.models.limits import check_prompts
from tulu_lightning.models.sharding import Fsdp2
from tulu_lightning.rollout.engines import EngineSettings
from tulu_lightning.rollout.pool import PoolLimits
from tulu_lightning.rollout.scoring import Scorer
from tulu_lightning.rollout.together import ALONE, Together
from tulu_lightning.stages.checks import check_tokenizer, warn_of_bf16_weights
from tulu_lightning.stages.collect import Collector
from tulu_lightning.stages.engine_holder import EngineHolder
from tulu_lightning.stages.guards import Watchman
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.ppo_checks import check_critic, check_settings
from tulu_lightning.stages.ppo_learning import Learner, sum_of
from tulu_lightning.stages.ppo_metrics import rollout_metrics, table, token_metrics
from tulu_lightning.stages.ppo_settings import Critic, DynamicSampling, Guards, Reward, Rollout
from tulu_lightning.stages.rollouts import Rollouts
from tulu_lightning.types import Prompt, PromptBatch

__all__ = ["PPO", "Critic", "DynamicSampling", "Guards", "Reward", "Rollout"]


class PPO(Learner, EngineHolder):
    """One step: n responses to each prompt from an engine that provably holds the right weights, a verdict on each,
    then `epochs` passes of critic and policy updates over them. With an advantage of `core.groups` (GRPO, ...) there is
    no critic.

    The policy's learning rate is a function of the step, the critic's warm-up included: with `critic.warmup_steps` its
    first update runs at the rate which its schedule has reached by then, not at the peak.

    Args:
        backbone: the policy's start, and the frozen reference.
        optimizer: the policy's.
        rollout: sampling.
        critic: the value network; GAE needs one, and nothing else does.
        advantage: GAE if left out, or one of `core.groups`.
        reward: what a verdict is worth.
        overlong: what becomes of a response that was cut; -10 in place of its reward if left out.
        kl: how the policy is held near the reference; with coefficient 0 there is none.
        policy_loss: clipped surrogate.
        value_loss: clipped squared error.
        value_coefficient: weight of the value loss (the paper's c1; it matters only together with clipping); 0.1 if left out.
        aggregation: what the policy's loss is a mean of: `token`s, `sequence`s, or sums over a `constant` length.
        correction: what makes up for the engine not being quite the trainer.
        dynamic_sampling: replace groups that carry no signal.
        entropy_coefficient: weight of the entropy bonus.
        scoring: limits of the processes that verifiers run in.
        guards: when the run stops itself.
        epochs: passes over each rollout batch (K).
        mini_batches: updates per pass.
        micro_tokens: limit of one pack, in tokens.

    Raises:
        InputError: a number out of its range, settings that clash (`stages.ppo_checks`), a critic with another
            tokenizer, or one that starts from a classifier that is no reward model (`models.heads.has_reward_head`).
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: AdamW,
        rollout: Rollout,
        critic: Critic | None = None,
        advantage: Advantage | None = None,
        reward: Reward | None = None,
        overlong: Overlong | None = None,
        kl: Kl | None = None,
        policy_loss: ClippedPolicy | None = None,
        value_loss: ClippedValue | None = None,
        value_coefficient: float | None = None,
        aggregation: Aggregation = "token",
        correction: Correction | None = None,
        dynamic_sampling: DynamicSampling | None = None,
        entropy_coefficient: float = 0.0,
        scoring: PoolLimits | None = None,
        guards: Guards | None = None,
        epochs: int = 4,
        mini_batches: int = 1,
        micro_tokens: int = 4096,
    ) -> None:
        super().__init__(backbone, optimizer)
        self.rollout, self.critic_config, self.advantage = rollout, critic, advantage or GAE()  # type: ignore[assignment]
        self.reward, self.overlong, self.kl = reward or Reward(), overlong or Overlong(), kl or Kl()
        self.policy_loss, self.value_loss = policy_loss or ClippedPolicy(), value_loss or ClippedValue()
        self.value_coefficient = 0.1 if value_coefficient is None else value_coefficient
        self.of_the_critic = {"value_loss": value_loss, "value_coefficient": value_coefficient}
        self.aggregation, self.correction = aggregation, correction or Correction()
        self.dynamic_sampling, self.entropy_coefficient = dynamic_sampling, entropy_coefficient
        self.epochs, self.mini_batches, self.micro_tokens = epochs, mini_batches, micro_tokens
        check_settings(self)
        self.kl_coefficient = self.kl.coefficient
        self.watchman, self.scoring = Watchman(guards or Guards()), scoring
        self.tokenizer = load_tokenizer(self.folder)
        self.critic_folder = self.folder
        if critic is not None:
            self.critic_folder = os.path.realpath(resolve_model(critic.path)) if critic.path else self.folder
            check_critic(self)
            self._critic_goes_on = has_reward_head(self.critic_folder, critic.layers)
        self.critic: PackedValue | None = None
        self.scorer: Scorer | None = None
        self._restored: dict[str, Any] = {}
        self._reference: list[PackedLM] = []  # in a list: not a submodule, so neither trained nor checkpointed

    # Building ---------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Policy, critic and the frozen reference, those that there are."""
        fresh = self.policy is None
        super().configure_model()
        if not fresh:
            return
        if (settings := self.critic_config) is not None:
            config = replace(self.backbone, path=self.critic_folder, layers=settings.layers)
            head = "the reward model's head goes on" if self._critic_goes_on else "a language model, with a fresh head"
            rank_zero_info(f"PPO's critic starts from {self.critic_folder}: {head}")
            self.critic = self.placed(lambda: PackedValue(config, self.critic_folder), config)
        if self.kl.coefficient and self.backbone.lora is None:  # else the policy without its adapters is the reference
            frozen = lambda: PackedLM(self.backbone, self.folder).requires_grad_(False)  # noqa: E731
            self._reference = [self.placed(frozen, self.backbone)]

    def settings(self) -> dict[str, Any]:
        """Everything but what only cuts (`micro_tokens`), what samples (`rollout.engine`), and when to stop."""
        losses = ("overlong", "kl", "policy_loss", "aggregation", "correction")
        names = ("advantage", "reward", *losses, "dynamic_sampling", "entropy_coefficient", "epochs", "mini_batches")
        own: dict[str, Any] = {name: getattr(self, name) for name in names}
        own["rollout"] = replace(self.rollout, engine=EngineSettings(), engines="per_rank", wait_seconds=3600.0)
        own["refresh every_n_steps"] = self._refresh_interval()
        own["stop ids"] = self.stop_ids()
        if self.critic_config is not None:
            own |= {"value_loss": self.value_loss, "value_coefficient": self.value_coefficient}
            own["critic"] = replace(self.critic_config, path=None)  # a path says nothing of the weights behind it
            own["critic start weights"] = self.digest_of(self.critic_folder)
            own["critic start config"] = config_digest(self.critic_folder)
        return own

    def _refresh_interval(self) -> int:
        callbacks: Any = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((getattr(c, "every_n_steps", 1) for c in callbacks if type(c).__name__ == "RolloutRefresh"), 1)

    def configure_optimizers(self) -> Any:
        """The policy's, and the critic's if there is one."""
        own = self.optimizer.build(self.model.parameters())
        if self.critic is None or self.critic_config is None:
            return own
        return [own, self.critic_config.optimizer.build(self.critic.parameters())]

    def setup(self, stage: str) -> None:
        """Warn of the critic's weights, too."""
        super().setup(stage)
        if self.critic_config is not None:
            warn_of_bf16_weights(self.backbone, self.critic_config.optimizer.lr)

    def check_data(self, data: Any) -> None:
        """Prompts must be the policy's own tokens, and fit it, the critic and the engine together with their responses."""
        if not isinstance(data, PromptData):
            raise InputError("data", f"is {type(data).__name__}", "PPO samples from prompts: use PromptData.")
        check_tokenizer(data, self.start)
        for folder in dict.fromkeys((self.folder, self.critic_folder)):
            check_prompts(data.prompts, self.rollout.max_new_tokens, folder)
        self.check_engine(data.longest_prompt)

    def on_fit_start(self) -> None:
        """Start what samples and scores."""
        if not isinstance(self.trainer.strategy, Fsdp2):
            for reference in self._reference:
                reference.to(self.device)
        self.together = Together.of(self.trainer, self.rollout.wait_seconds)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.start_engine(data.longest_prompt)
        self.scorer = Scorer(data.verifiers, self.scoring)
        self.rollouts = Rollouts(
            # Ranks of its own: a batch that is sampled ahead is gathered while the step's metrics are.
            self.collector(
                self.scorer, data.prompts, self.stop_ids(), Together.of(self.trainer, self.rollout.wait_seconds)
            ),
            lambda: self.engine,  # type: ignore[arg-type, return-value]
            self.restart_engine,
            self.rollout.staleness,
            self.rollout.wait_seconds,
        )
        self.rollouts.every_n_steps = self._refresh_interval()
        self.restore_engine(self._restored)

    def collector(
        self, scorer: Scorer, prompts: Sequence[Prompt] = (), stop_ids: tuple[int, ...] = (), ranks: Together = ALONE
    ) -> Collector:
        """What samples and scores a step under these settings."""
        return Collector(
            rollout=self.rollout,
            reward=self.reward,
            overlong=self.overlong,
            dynamic=self.dynamic_sampling,
            scorer=scorer,
            tokenizer=self.tokenizer,
            stop_ids=stop_ids,
            prompts=prompts,
            together=ranks,
            one_engine=self.rollout.engines == "one",
            least=1 if needs_critic(self.advantage) else 2,
        )

    def teardown(self, stage: str) -> None:
        """End what samples and scores."""
        self._close()
        super().teardown(stage)

    def _close(self, wait: bool = True) -> None:
        self.close_engine(wait)
        if self.scorer is not None:
            self.scorer.close()
            self.scorer = None

    # The step ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One rollout batch: collect, score, estimate, learn."""
        try:
            self._train(batch)
        except BaseException as error:
            self._close(wait=isinstance(error, Exception))
            raise

    def _train(self, batch: PromptBatch) -> None:
        assert self.rollouts is not None
        self.keep_weights()
        collected = self.rollouts.take(batch)
        if self.rollout.staleness and (following := self.following(batch.step)) is not None:
            self.rollouts.begin(following)
        clock = [time.perf_counter()]
        parts = self.estimate(collected.groups)
        clock.append(time.perf_counter())
        epochs = self.learn(parts)
        clock.append(time.perf_counter())
        first, *others = self.together.gather(epochs, f"metrics of step {self.step}")
        epochs = first.plus(others)
        experience = self.seen(parts)
        mismatch = sum_of([self.correction.mismatch(e.old_N, e.micro.sampler_N) for e in experience if e.known])
        self.samples = table(collected, experience, self.tokenizer)
        metrics = {
            **epochs.metrics(),
            **rollout_metrics(collected),
            **token_metrics(experience),
            **(mismatch.metrics() if experience else {}),
            **self.phase_seconds(collected.seconds, clock),
            "advantage_std": self.advantage_std,
            "kl_coefficient": self.kl_coefficient,
        }
        # While only the critic learns the KL is 0 whatever β is.
        measured = metrics.get("kl_response", float("nan")) if self.policy_learns else float("nan")
        self.kl_coefficient = adapted(self.kl_coefficient, measured, int(metrics["trained_responses"]), self.kl)
        self.finish_step(metrics)
        rewards = tuple(reward for group in collected.raw for reward in group.rewards)
        self.halt = self.watchman.after(self.step, metrics, rewards)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop where a guard says so; the callbacks have recorded and saved the step by now.

        Raises:
            RunStopped: sampler and trainer disagree, or there is nothing to learn from.
        """
        if self.halt:
            raise RunStopped(self.halt)

    # Checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adaptive β, the batch that is sampled ahead, and the engine's weights if they are older."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["tulu_ppo"] = {"kl_coefficient": self.kl_coefficient, **self.engine_state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with them."""
        super().on_load_checkpoint(checkpoint)
        self._restored = checkpoint.get("tulu_ppo", {})
        self.kl_coefficient = self._restored.get("kl_coefficient", self.kl_coefficient)
        if self.rollouts is not None:  # sharded checkpoints are read after `on_fit_start`
            self.restore_engine(self._restored)
