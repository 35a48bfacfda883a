"""FSDP2, alone or with tensor parallelism, through Lightning's ModelParallelStrategy.

Two things are done differently from stock. The mesh is set here: the stock default is (1, all), which shards nothing,
gives every rank the same batch, and says nothing. And directory checkpoints are written beside and renamed
(`models.sharded_saving`).

Networks are built without weights, sharded, and filled from their files part by part (`models.skeleton`).
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_warn
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.models.loading import decoder_layers
from tulu_lightning.models.mesh import Meshes, mesh_sizes
from tulu_lightning.models.sharded_saving import ShardedSaving
from tulu_lightning.models.skeleton import NotStreamedError, decoder_of, materialise, without_weights
from tulu_lightning.models.tensor_parallel import check_splits, split

__all__ = ["Fsdp2", "check_integers", "shard"]


INTEGERS = Version("2.12")
"""Version of torch whose FSDP2 takes parameters that are no floating-point numbers, as they are."""


class Fsdp2(ShardedSaving):
    """`strategy: fsdp2`: every rank holds a slice of each parameter, its gradient and its optimiser state."""

    def __init__(
        self,
        tensor_parallel: int = 1,
        replicas: int = 1,
        cpu_offload: bool = False,
        async_save: bool = False,
        timeout_minutes: float = 30.0,
    ) -> None:
        """Keep the settings.

        Args:
            tensor_parallel: ranks that compute one forward together, on the same rows (`models.tensor_parallel`).
            replicas: whole copies of the model (hybrid sharding): gathering stays within a copy's ranks, and only
                gradients travel between copies. 1 shards over all ranks.
            cpu_offload: keep weights, gradients and optimiser states on the host, and update them there.
            async_save: write checkpoints while training goes on.
            timeout_minutes: how long a rank may wait for the others in one place.
        """
        super().__init__()
        self.tensor_parallel, self.replicas = tensor_parallel, replicas
        self.cpu_offload, self.async_save = cpu_offload, async_save
        self.timeout_minutes = timeout_minutes
        self._meshes: Meshes | None = None

    def setup_environment(self) -> None:
        """Divide the ranks, and set the mesh before Lightning builds it.

        Raises:
            InputError: they do not divide, a setting cannot be, or the accelerator leaves nothing to offload from.
        """
        # Here, and not where they are given: a config's classes are made behind a parser that hides such errors.
        if not 0 < self.timeout_minutes < float("inf"):
            where, what = "trainer.strategy.init_args.timeout_minutes", f"is {self.timeout_minutes}"
            raise InputError(where, what, "Use minutes above 0.")
        self._timeout = timedelta(minutes=self.timeout_minutes)
        sizes = mesh_sizes(self.num_nodes * self.num_processes, self.tensor_parallel, self.replicas)
        if self.cpu_offload and self.root_device.type == "cpu":
            what = "is true, and the accelerator is the CPU, whose memory everything is in already"
            raise InputError("trainer.strategy.init_args.cpu_offload", what, "Leave it out.")
        self._data_parallel_size, self._tensor_parallel_size = sizes.data, sizes.tensor
        super().setup_environment()
        self._meshes = Meshes(self.device_mesh, sizes)
        self.set_timeouts()

    @property
    def meshes(self) -> Meshes:
        """The groups of ranks, once they have started."""
        assert self._meshes is not None
        return self._meshes

    @property
    def mesh(self) -> list[int] | None:
        """How many ranks there are along each axis, once they have started."""
        return None if self._meshes is None else [*self._meshes.sizes]

    def placed(self, build: Callable[[], Any], config: Backbone) -> Any:
        """A network on this rank: its slice of what `build` makes.

        Args:
            build: makes a `PackedLM`, `PackedReward` or `PackedValue`.
            config: its backbone.

        Raises:
            InputError: it cannot be split as asked, or its weights do not load.
        """
        try:
            with without_weights():
                module = build()
        except NotStreamedError as reason:
            rank_zero_warn(f"{config.path}: each rank loads the whole model before it is sharded, as {reason}")
            module = build()
        if self.meshes.tensor is not None:
            check_splits(config, decoder_of(module), self.meshes.sizes.tensor)
            split(decoder_of(module), self.meshes.tensor, config.path)
        offload = CPUOffloadPolicy(pin_memory=True) if self.cpu_offload else OffloadPolicy()
        shard(module, self.meshes.data, getattr(torch, config.compute_dtype), self.meshes.whole, offload)
        home = torch.device("cpu") if self.cpu_offload else self.root_device
        materialise(module, home, config.lora, self.root_device)
        return module

    def model_to_device(self) -> None:
        """Move what is not sharded; what is offloaded stays on the host."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.lightning_module is not None
        self.lightning_module._device = self.root_device  # where it computes
        for part in self.lightning_module.modules():
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else buffer.to(self.root_device)

    def sum_over_rows(self, sums: Tensor) -> Tensor:
        """Sum a tensor over the ranks that have different rows; it comes back on its own device."""
        moved = sums.to(self.root_device, copy=True)  # NCCL reduces on its own device only
        dist.all_reduce(moved, group=self.device_mesh["data_parallel"].get_group())
        return moved.to(sums.device)


def check_integers() -> None:
    """Refuse to shard codes of 4 bits where torch cannot.

    Raises:
        InputError: it is older than 2.12.
    """
    if Version(torch.__version__) < INTEGERS:
        what = f"is set under strategy fsdp2, and torch {torch.__version__} shards no integers"
        raise InputError("backbone.quantize", what, "Install torch 2.12 or newer, or run on one device without it.")


def shard(
    module: nn.Module,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype = torch.float32,
    whole: DeviceMesh | None = None,
    offload: OffloadPolicy | None = None,
) -> nn.Module:
    """Shard a `PackedLM`, `PackedReward` or `PackedValue` in place: each decoder layer by itself, then the whole as root.

    The whole, not the transformers model, is the root: the output head's weight is gathered in the root's forward, and
    that is where log-probs are computed. A scalar head is a group of its own, gathered in fp32.

    Args:
        module: with full (or meta) parameters, or those of layers split by tensor parallelism.
        mesh: of the layers.
        compute_dtype: dtype of gathered parameters and matrix products; gradients are reduced in fp32.
        whole: mesh of what is not in layers; the same if left out.
        offload: whether the host keeps the shards.

    Raises:
        InputError: the architecture's layers are not where they can be found.
    """
    precise = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    policy = replace(precise, param_dtype=None if compute_dtype == torch.float32 else compute_dtype)
    common: dict[str, Any] = {"offload_policy": offload or OffloadPolicy()}
    wrapped: Any = module
    for layer in decoder_layers(decoder_of(module), wrapped.config.path):
        fully_shard(layer, mesh=mesh, mp_policy=policy, **common)
    if isinstance(head := getattr(module, "head", None), nn.Module):
        fully_shard(head, mesh=whole or mesh, mp_policy=precise, **common)
    # A frozen network has no backward that would free the root's gathered embedding and head.
    trained = any(parameter.requires_grad for parameter in module.parameters())
    # The root's inputs are a pack: not activations would be cast, but the weights of a loss.
    policy = replace(policy, cast_forward_inputs=False)
    again = None if trained else True
    fully_shard(module, mesh=whole or mesh, mp_policy=policy, reshard_after_forward=again, **common)
    return module


StrategyRegistry.register("fsdp2", Fsdp2, description="FSDP2 over all ranks")
