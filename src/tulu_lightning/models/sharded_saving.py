"""Directory checkpoints of sharded runs: each rank writes its part beside, and one rename makes it a checkpoint.

A save that is killed halfway over an older one would load without error as a mixture of both.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _METADATA_FILENAME
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.optim import Optimizer

from tulu_lightning.models.watched import WatchedRanks

__all__ = ["ShardedSaving"]


class ShardedSaving(WatchedRanks):
    """The part of `Fsdp2` that writes checkpoints."""

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimiser, one that has not made a step yet included (PPO's policy while its critic warms up).

        PyTorch makes such a one take a step with gradients of zero to have a state to save. Saved or not, the first
        real step would be Adam's second then, half as large.
        """
        unused = not optimizer.state
        state = super().optimizer_state(optimizer)
        if unused:
            for values in state["state"].values():
                values["step"].zero_()
            optimizer.state.clear()
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a directory checkpoint to a hidden sibling, then rename it: a name either is whole or is not there."""
        path = Path(self.broadcast(filepath))
        beside = path.with_name(f".{path.name}.tmp")
        if self.global_rank == 0:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        self.barrier()
        optimizers = {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
        save_sharded({"state_dict": checkpoint.pop("state_dict"), **optimizers}, checkpoint_id=beside)
        if self.global_rank == 0:
            torch.save(checkpoint, beside / _METADATA_FILENAME)
            _sync(beside)
            shutil.rmtree(path, ignore_errors=True)
            os.rename(beside, path)
            _sync(path.parent)
        self.barrier()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
