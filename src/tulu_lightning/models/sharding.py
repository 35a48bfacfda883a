"""FSDP2 over all ranks, through Lightning's ModelParallelStrategy.

Two things are done differently from stock. The mesh is set here to (all ranks, 1): the stock default is (1, all),
which shards nothing, gives every rank the same batch, and says nothing. And directory checkpoints are written beside
and renamed, because a save that is killed halfway over an older one loads without error as a mixture of both.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tulu_lightning.models.loading import decoder_layers

__all__ = ["Fsdp2", "shard"]


class Fsdp2(ModelParallelStrategy):
    """`strategy: fsdp2`: every rank holds a slice of each parameter, its gradient and its optimiser state."""

    def setup_environment(self) -> None:
        """Set the mesh to (all ranks, 1) before Lightning builds it."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

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


def shard(module: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype = torch.float32) -> nn.Module:
    """Shard a `PackedLM`, `PackedReward` or `PackedValue` in place: each decoder layer by itself, then the whole as root.

    The whole, not the transformers model, is the root: the output head's weight is gathered in the root's forward, and
    that is where log-probs are computed. A scalar head is a group of its own, gathered in fp32. Training is tested in fp32, on two processes against one; of bf16 only the forward
    is, on a mesh of one.

    Args:
        module: with full (or meta) parameters.
        mesh: the data-parallel mesh.
        compute_dtype: dtype of gathered parameters and matrix products; gradients are reduced in fp32.

    Raises:
        InputError: the architecture's layers are not where they can be found.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == torch.float32 else compute_dtype, reduce_dtype=torch.float32
    )
    for layer in _layers(module):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if isinstance(head := getattr(module, "head", None), nn.Module):
        fully_shard(head, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    fully_shard(module, mesh=mesh, mp_policy=policy)
    return module


def _layers(module: nn.Module) -> nn.ModuleList:
    wrapped: Any = module
    decoder = wrapped.lm.get_decoder() if hasattr(wrapped, "lm") else wrapped.decoder
    return decoder_layers(decoder, wrapped.config.path)


StrategyRegistry.register("fsdp2", Fsdp2, description="FSDP2 over all ranks")
