"""When the engine gets the present weights."""

from typing import Any

import lightning as L

from tulu_lightning.errors import InputError

__all__ = ["RolloutRefresh"]


class RolloutRefresh(L.Callback):
    """Push the policy's weights to the engine before every n-th step.

    The engine proves that it took them (per-tensor checksums); PPO refuses to sample from any other version.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise InputError("RolloutRefresh.every_n_steps", f"is {every_n_steps}", "Use at least 1.")
        self.every_n_steps = every_n_steps

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Refresh unless the engine is current already."""
        wanted = pl_module.wanted_version(self.every_n_steps)
        if pl_module.engine.version != wanted:
            pl_module.refresh()
