"""When the engine gets the present weights, and the proof that it samples from them."""

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from tulu_lightning.core.settings import require
from tulu_lightning.models.limits import read_limits
from tulu_lightning.models.weights import plain_weights
from tulu_lightning.rollout.canary import Agree, Proof, Sequences, Tolerance, canaries, follow, prove, tolerance_of
from tulu_lightning.rollout.elsewhere import Elsewhere
from tulu_lightning.rollout.engine import EngineError
from tulu_lightning.rollout.fingerprint import fingerprint
from tulu_lightning.rollout.together import ALONE

__all__ = ["RolloutRefresh"]


class RolloutRefresh(L.Callback):
    """Push the policy's weights to the engine when they are due, and stop the run unless it provably took them.

    The engine compares checksums, tensor by tensor; then a few fixed sequences are scored on both sides. The stage
    refuses to sample from any version but the one that is due. A push that fails names the tensors that differ.

    What a push took is left in `pl_module.sync_seconds`, how far the two sides' log-probs lay apart in
    `pl_module.sync_proof`.

    Args:
        every_n_steps: steps between two pushes; those between are sampled from older weights.
        canary: score the fixed sequences after a push.
        canary_every: after every so manyth push only; the first is always checked.
        tolerance: largest mean gap of their log-probs, in nats a token. By the coarser dtype of both sides if left
            out: float32 1e-3 at most for any token, bfloat16 0.3 on average.

    Raises:
        InputError: a number out of its range.
    """

    def __init__(
        self, every_n_steps: int = 1, canary: bool = True, canary_every: int = 1, tolerance: float | None = None
    ) -> None:
        for name, count in (("every_n_steps", every_n_steps), ("canary_every", canary_every)):
            require(count >= 1, f"RolloutRefresh.{name}", count, "Use at least 1.")
        sound = tolerance is None or 0 < tolerance < float("inf")
        require(sound, "RolloutRefresh.tolerance", tolerance, "It must be above 0, or null.")
        self.every_n_steps, self.canary, self.canary_every, self.tolerance = (
            every_n_steps,
            canary,
            canary_every,
            tolerance,
        )
        self._pushes = 0
        self._sequences: Sequences | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Push unless the engine has the version that is due."""
        pl_module.sync_seconds = 0.0
        if pl_module.engine.version == self._due(pl_module):
            return
        start = time.perf_counter()
        pl_module.refresh()
        self._pushes += 1
        if self.canary and (self._pushes - 1) % self.canary_every == 0:
            pl_module.sync_proof = self._proved(trainer, pl_module)
        pl_module.sync_seconds = time.perf_counter() - start

    def _proved(self, trainer: L.Trainer, pl_module: Any) -> Proof | None:
        """`prove`, once more if an engine died over it: another push starts another one."""
        try:
            return self.prove(trainer, pl_module)
        except EngineError as error:
            rank_zero_warn(f"the engine failed at the proof of step {pl_module.step} ({error}): pushing once more")
            pl_module.refresh()
            return self.prove(trainer, pl_module)

    def prove(self, trainer: L.Trainer, pl_module: Any) -> Proof | None:
        """Compare the fixed sequences' log-probs on both sides; None if the stage or the engine cannot score them.

        Raises:
            RefreshError: they lie further apart than the tolerance.
        """
        own = getattr(pl_module, "canary_logprobs", None)
        if own is None or not hasattr(pl_module.engine, "logprobs"):
            return None
        if self._sequences is None:
            self._sequences = self._canaries(pl_module)
        engine, together = pl_module.engine, getattr(pl_module, "together", ALONE)
        agree: Agree = lambda call: together.run(call, f"proof of step {pl_module.step}")  # noqa: E731
        if isinstance(engine, Elsewhere):
            return follow(own, self._sequences, agree)
        dtype = getattr(engine, "dtype", torch.bfloat16)
        sides = (dtype, getattr(torch, pl_module.backbone.compute_dtype))
        coarser = torch.float32 if all(side == torch.float32 for side in sides) else torch.bfloat16
        tolerance = tolerance_of(coarser) if self.tolerance is None else Tolerance(None, self.tolerance)
        # Gathering shards needs all ranks, and not all need have met the error.
        differing = None if trainer.world_size > 1 else lambda: _differing(pl_module, dtype)
        return prove(engine, own, self._sequences, tolerance, pl_module.rollout.temperature, differing, agree)

    def _due(self, pl_module: Any) -> int:
        wanted = getattr(pl_module, "wanted_version", None)
        if wanted is not None:
            return wanted(self.every_n_steps)
        return pl_module.step - pl_module.step % self.every_n_steps

    @staticmethod
    def _canaries(pl_module: Any) -> Sequences:
        limits = read_limits(pl_module.folder)
        room = min(limits.positions or 1 << 30, getattr(pl_module.engine, "positions", 1 << 30))
        if together := getattr(pl_module, "together", None):  # the engine's room, also where it is on another rank
            room = min(together.gather(room, "room for canaries"))
        response = min(8, room // 4)
        return canaries(limits.vocabulary, prompt=min(144, room - response - 1), response=response)


def _differing(pl_module: Any, dtype: torch.dtype) -> dict[str, list[str]]:
    held = pl_module.engine.fingerprint()
    weights = getattr(pl_module, "policy_weights", None) or (lambda: plain_weights(pl_module.model.lm))
    sent = fingerprint(weights(), dtype)
    return {"not held as sent": [name for name, word in sent.items() if held.get(name) != word]}
