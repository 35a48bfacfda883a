"""The stage's side of an engine: which weights it gets, a second engine when it dies, and log-probs to prove a refresh."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from tulu_lightning.core.packing import length, pack
from tulu_lightning.core.step_plan import cut
from tulu_lightning.errors import InputError, RunStopped
from tulu_lightning.models.lora import adapter_weights
from tulu_lightning.models.weights import full, plain_weights
from tulu_lightning.rollout.elsewhere import Elsewhere
from tulu_lightning.rollout.engine import Engine, EngineError
from tulu_lightning.rollout.engines import build_engine, check_cache, check_push, check_shared
from tulu_lightning.rollout.together import ALONE, Together
from tulu_lightning.stages.ppo_settings import Rollout
from tulu_lightning.stages.rollouts import Rollouts, expected_version
from tulu_lightning.stages.stage import Stage
from tulu_lightning.types import Document, PromptBatch, Segment

__all__ = ["EngineHolder"]


class EngineHolder(Stage):
    """The part of `PPO` that keeps an engine.

    Attributes:
        engine: samples for training; give your own before `fit`, or the stage builds one by `rollout.engine`.
        sync_seconds: what the last refresh took, proof included; whoever makes it may set it.
    """

    rollout: Rollout
    micro_tokens: int
    engine: Engine | None = None
    rollouts: Rollouts | None = None
    together: Together = ALONE
    sync_seconds = 0.0
    _own_engine = False
    _kept: tuple[int, dict[str, Tensor]] | None = None

    def check_engine(self, longest_prompt: int = 0) -> None:
        """Refuse an engine that cannot hold the policy, or a prompt and its response.

        Args:
            longest_prompt: tokens of the run's longest prompt.

        Raises:
            InputError: vLLM reads the model's folder, and the policy has only some of its layers; it is to be in the
                first rank's process alone; or it is given too few positions, or too little memory for their keys and
                values.
        """
        if (self.rollout.engine.kind, self.rollout.engines) == ("vllm", "one") and self.trainer.world_size > 1:
            what = "is one, and vLLM within the first rank makes process groups in which it waits for all others"
            raise InputError("rollout.engines", what, "Use per_rank, or rollout.engine.kind: server.")
        if self.backbone.layers is not None and self.rollout.engine.kind != "local":
            what = f"is {self.rollout.engine.kind}, which loads whole models, and backbone.layers cuts the policy"
            raise InputError("rollout.engine.kind", what, "Use local, or leave backbone.layers out.")
        check_push(self.rollout.engine, self.backbone.lora, self.backbone.quantize is not None)
        if self.rollout.engine.max_model_len is not None:
            self._check_room(self.rollout.engine.max_model_len, longest_prompt)
        check_shared(self.rollout.engine, self.trainer.strategy.root_device.type == "cuda")
        check_cache(self.rollout.engine, self.folder)

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What a refresh sends: the weights with adapters merged, or the adapters alone; sharded where they are sharded."""
        lm = self.model.lm
        return adapter_weights(lm) if self.rollout.engine.push == "adapter" else plain_weights(lm)

    def _check_room(self, positions: int, longest_prompt: int) -> None:
        """Before the first step: later it would be the step that happens to draw the longest prompt."""
        new = self.rollout.max_new_tokens
        if longest_prompt + new > positions:
            what = (
                f"gives {positions} positions, and the longest prompt has {longest_prompt} tokens with {new} new ones"
            )
            remedy = (
                "Raise it, or lower data.init_args.max_tokens (longer prompts are dropped) or rollout.max_new_tokens."
            )
            raise InputError("rollout.engine.max_model_len", what, remedy)

    def start_engine(self, longest_prompt: int = 0) -> None:
        """Build the engine, unless one was given; the `RolloutRefresh` callback keeps it current.

        Args:
            longest_prompt: as for `check_engine`; a server that runs already has a limit of its own.
        """
        if self.engine is None:
            self.engine, self._own_engine = self._engine_of_this_rank(), True
        positions = getattr(self.engine, "positions", None)
        check = lambda: None if positions is None else self._check_room(positions, longest_prompt)  # noqa: E731
        self.together.run(check, "room for prompts and responses")

    def build_engine(self) -> Engine:
        """A new engine by `rollout.engine`; a subclass may build another."""
        return build_engine(self.rollout.engine, self.make_engine, self.folder, self.backbone.lora)

    def _engine_of_this_rank(self) -> Engine:
        """An engine, or what stands for the first rank's. Making one of present weights gathers them: all ranks do it."""
        what = "start of the engine"
        gathers = self.rollout.engine.kind == "local"
        if self.rollout.engines == "per_rank" or self.together.first:
            engine = self.build_engine() if gathers else self.together.run(self.build_engine, what)
        else:
            engine = Elsewhere(-1)
            if gathers:
                engine.refresh(self._whole(plain_weights(self.model.lm)), self.step)
            else:
                self.together.run(lambda: None, what)
        version = self.together.gather(engine.version, what)[0]
        if isinstance(engine, Elsewhere):
            engine.version = version
        return engine

    @staticmethod
    def _whole(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        return ((name, full(tensor.detach())) for name, tensor in named)

    def wanted_version(self, every_n_steps: int = 1) -> int:
        """Version that the engine has to hold when the present step begins, if weights are pushed every n steps.

        Waits for a batch that is still being sampled ahead: after this call the engine may take new weights.
        """
        if self.rollouts is not None:
            self.rollouts.every_n_steps = every_n_steps
            self.rollouts.wait()
        return expected_version(self.step, every_n_steps)

    def refresh(self) -> None:
        """Hand the present weights to the engine, stamped with the number of finished steps.

        Raises:
            RefreshError: the engine does not hold what it was sent.
            RunStopped: the engine died, and so did the one in its place.
        """
        assert self.engine is not None
        started = time.perf_counter()
        if self.rollouts is not None:
            self.rollouts.wait()
        try:
            self._push(self.engine, self.step)
        except EngineError as error:
            rank_zero_warn(f"the engine failed at the refresh of step {self.step} ({error}): starting another one")
            try:
                self.restart_engine(self.step)
            except EngineError as second:
                raise RunStopped(
                    f"the engine failed twice at the refresh of step {self.step}: {error}; then {second}. Nothing of that "
                    "step was trained. When it can run again, the same command goes on from the last checkpoint."
                ) from second
        self.sync_seconds = time.perf_counter() - started

    def _push(self, engine: Engine, version: int) -> None:
        if version == self.step:
            self._deliver(engine, self.policy_weights(), version)
            return
        if self._kept is None or self._kept[0] != version:
            held = "none" if self._kept is None else f"those of step {self._kept[0]}"
            raise EngineError(f"the weights of step {version} are wanted and gone; kept are {held}")
        self._deliver(engine, self._kept[1].items(), version)

    def _deliver(self, engine: Engine, named: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Refresh on all ranks; if it fails on one, all of them hear of it."""
        whole = self._whole(named)

        def push() -> None:
            try:
                engine.refresh(whole, version)
            finally:
                for _ in whole:  # the other ranks still gather with this one
                    pass

        self.together.run(push, f"refresh of step {version}")

    def restart_engine(self, version: int) -> Engine:
        """Another engine in place of the present one, with the weights of a version: the present, or the kept ones.

        Raises:
            EngineError: it does not start.
        """
        with suppress(Exception):  # it is dead; what it still holds should go before the next one comes
            assert self.engine is not None
            self.engine.close()
        self.engine, self._own_engine = self._engine_of_this_rank(), True
        if self.engine.version != version:
            self._push(self.engine, version)
        return self.engine

    def keep_weights(self) -> None:
        """Keep a copy of the engine's weights on the host where the present ones will not do for long.

        With a refresh every n steps a resumed run needs those of up to n - 1 steps ago, and a batch that is sampled
        ahead may have to be sampled again after the update. A rank whose engine is on another one keeps none: it only
        takes part in gathering.
        """
        assert self.engine is not None
        assert self.rollouts is not None
        ages = self.rollouts.every_n_steps > 1 or self.rollout.staleness
        if ages and self.engine.version == self.step and (self._kept is None or self._kept[0] != self.step):
            keeps, weights = not isinstance(self.engine, Elsewhere), dict[str, Tensor]()
            for name, tensor in self._whole(self.policy_weights()):
                if keeps:
                    weights[name] = tensor.cpu().clone()
            self._kept = (self.step, weights)

    @torch.no_grad()
    def canary_logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
        """The trainer's own log-probs of given tokens, at the rollout's temperature: what an engine's are held against.

        Args:
            sequences: (prompt, response) token ids; neither is empty.

        Returns:
            For each sequence float32 `[L]`, on the host: one per response token, in nats.
        """
        documents = [_document(prompt, response) for prompt, response in sequences]
        result: list[Tensor] = [torch.empty(0)] * len(documents)
        for items in cut([length(document) for document in documents], self.micro_tokens)[0]:
            packed: Any = self.trainer.strategy.batch_to_device(pack([documents[i] for i in items]))
            logp_N = self.model(packed, self.rollout.temperature).logp_N.cpu()
            for i, logp_L in zip(items, logp_N.split([len(sequences[i][1]) for i in items]), strict=True):
                result[i] = logp_L
        return result

    def following(self, step: int) -> PromptBatch | None:
        """The prompts of the step after this one; None after the last."""
        if step + 1 >= min(self.total_steps, self.trainer.num_training_batches):
            return None
        loader: Any = self.trainer.train_dataloader
        return loader.dataset[step + 1]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Start the step's clock when its refresh began: that is work of this step."""
        result = super().on_train_batch_start(batch, batch_idx)
        waited = 0.0 if self.rollouts is None else self.rollouts.seconds_wait
        self._started -= self.sync_seconds + waited
        return result

    def phase_seconds(self, collecting: Mapping[str, float], clock: Sequence[float]) -> dict[str, float]:
        """What each phase of the step took.

        With staleness 1 `generate` and `score` ran beside the step before, and `wait` is what was left of them.

        Args:
            collecting: of the rollouts.
            clock: before the log-probs, before the updates, after them.
        """
        assert self.rollouts is not None
        result = {f"seconds_{name}": spent for name, spent in collecting.items()}
        result |= {"seconds_logprobs": clock[1] - clock[0], "seconds_update": clock[2] - clock[1]}
        result |= {"seconds_sync": self.sync_seconds, "seconds_wait": self.rollouts.seconds_wait}
        self.sync_seconds = self.rollouts.seconds_wait = 0.0
        return result

    # Checkpoints ------------------------------------------------------------------------------------------------

    def engine_state(self) -> dict[str, Any]:
        """The batch that is sampled ahead, and the engine's weights where they are not those of the checkpoint."""
        ahead = None if self.rollouts is None else self.rollouts.state()
        older = self._kept is not None and self._kept[0] != self.step
        needed = older and self.rollouts is not None and self.rollouts.every_n_steps > 1
        return {"ahead": ahead, "engine": self._kept if needed else None}

    def restore_engine(self, state: dict[str, Any]) -> None:
        """Go on with what `engine_state` gave, once engine and rollouts are there."""
        assert self.engine is not None
        assert self.rollouts is not None
        self.rollouts.restore(state.get("ahead"))
        if state.get("engine") is not None:
            version, weights = state["engine"]
            kept = "adapter" if any(".lora_A." in name for name in weights) else "merged"
            if kept != self.rollout.engine.push:
                what = (
                    f"is {self.rollout.engine.push}, and the checkpoint keeps the weights of step {version} as {kept}"
                )
                raise InputError("rollout.engine.push", what, f"Go on with {kept}.")
            self._kept = (version, weights)
            self._push(self.engine, version)

    def close_engine(self, wait: bool = True) -> None:
        """End what samples ahead, and close the engine if the stage built it."""
        if self.rollouts is not None:
            self.rollouts.close(wait)
        if self.engine is not None and self._own_engine and wait:
            self.engine.close()
            self.engine = None


def _document(prompt: Sequence[int], response: Sequence[int]) -> Document:
    prompt_L, response_L = torch.tensor(list(prompt)), torch.tensor(list(response))
    return Document((Segment(prompt_L, torch.zeros(len(prompt))), Segment(response_L, torch.ones(len(response)), 0)))
