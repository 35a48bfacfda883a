"""When the engine gets the present weights."""

from typing import Any

import lightning as L

__all__ = ["RolloutRefresh"]


class RolloutRefresh(L.Callback):
    """Push the policy's weights to the engine before each step that samples.

    The engine proves that it took them (per-tensor checksums); PPO refuses to sample from any other version.
    """

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Refresh unless the engine is current already."""
        if pl_module.engine.version != pl_module.step:
            pl_module.refresh()
