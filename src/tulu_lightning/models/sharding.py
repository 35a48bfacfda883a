"""FSDP2 over all ranks, through Lightning's ModelParallelStrategy.

Two things are done differently from stock. The mesh is set here to (all ranks, 1): the stock default is (1, all),
which shards nothing, gives every rank the same batch, and says nothing. And directory checkpoints are written beside
and renamed (`models.sharded_saving`).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tulu_lightning.models.backbone import Backbone
from tulu_lightning.models.loading import decoder_layers
from tulu_lightning.models.sharded_saving import ShardedSaving

__all__ = ["Fsdp2", "shard"]


class Fsdp2(ShardedSaving):
    """`strategy: fsdp2`: every rank holds a slice of each parameter, its gradient and its optimiser state."""

    def setup_environment(self) -> None:
        """Set the mesh to (all ranks, 1) before Lightning builds it."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def placed(self, build: Callable[[], Any], config: Backbone) -> Any:
        """A network on this rank: its slice of what `build` makes.

        Args:
            build: makes a `PackedLM`, `PackedReward` or `PackedValue`.
            config: its backbone.
        """
        mesh = self.device_mesh["data_parallel"]
        return shard(build(), mesh, getattr(torch, config.compute_dtype))

    def sum_over_rows(self, sums: Tensor) -> Tensor:
        """Sum a tensor over the ranks that have different rows; it comes back on its own device."""
        moved = sums.to(self.root_device, copy=True)  # NCCL reduces on its own device only
        dist.all_reduce(moved, group=self.device_mesh["data_parallel"].get_group())
        return moved.to(sums.device)


def shard(module: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype = torch.float32) -> nn.Module:
    """Shard a `PackedLM`, `PackedReward` or `PackedValue` in place: each decoder layer by itself, then the whole as root.

    The whole, not the transformers model, is the root: the output head's weight is gathered in the root's forward, and
    that is where log-probs are computed. A scalar head is a group of its own, gathered in fp32.

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
    # A frozen network has no backward that would free the root's gathered embedding and head.
    trained = any(parameter.requires_grad for parameter in module.parameters())
    # The root's inputs are a pack: not activations would be cast, but the weights of a loss.
    policy = replace(policy, cast_forward_inputs=False)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=None if trained else True)
    return module


def _layers(module: nn.Module) -> nn.ModuleList:
    wrapped: Any = module
    decoder = wrapped.lm.get_decoder() if hasattr(wrapped, "lm") else wrapped.decoder
    return decoder_layers(decoder, wrapped.config.path)


StrategyRegistry.register("fsdp2", Fsdp2, description="FSDP2 over all ranks")
