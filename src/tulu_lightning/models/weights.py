"""The weights of a model as everybody else names them: 4-bit matrices read, adapters merged, shards gathered."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

__all__ = ["fill", "full", "own_block", "plain_weights"]


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if it is sharded (then all ranks must call)."""
    if not isinstance(tensor, DTensor):
        return tensor
    device = tensor.device_mesh.device_type
    # What is kept on the host is gathered where the ranks can talk.
    near: Any = tensor if tensor.to_local().device.type == device else tensor.to(device)
    if any(isinstance(placement, _StridedShard) for placement in near.placements):  # then the shards of a split first
        near = near.redistribute(
            placements=[Replicate() if isinstance(p, _StridedShard) else p for p in near.placements]
        )
    return near.full_tensor()


def own_block(tensor: Tensor) -> tuple[slice, ...]:
    """Where this rank's part of a tensor lies in the whole: one slice for each dimension.

    Args:
        tensor: plain (all of it), or sharded by FSDP2, by tensor parallelism, or by both: then first by the latter.
    """
    starts, sizes = [0] * tensor.ndim, list(tensor.shape)
    if isinstance(tensor, DTensor):
        own: Any = tensor.device_mesh.get_coordinate()
        parts = [(p, tensor.device_mesh.size(i), own[i]) for i, p in enumerate(tensor.placements)]
        for placement, ranks, rank in sorted(parts, key=lambda part: isinstance(part[0], _StridedShard)):
            if isinstance(placement, Shard | _StridedShard):
                size = sizes[placement.dim]
                step = -(-size // ranks)  # torch.chunk's rule
                before = min(rank * step, size)
                starts[placement.dim] += before
                sizes[placement.dim] = min(step, size - before)
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into another, or this rank's part of it if that is sharded.

    Args:
        target: plain, or sharded.
        whole: of the same shape.
    """
    local = target.to_local() if isinstance(target, DTensor) else target
    local.copy_(whole[own_block(target)])


@torch.no_grad()
def plain_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the model's state dict as it would be without adapters and without 4 bits.

    `W + scaling · B A` in fp32 stands where W was, and of a 4-bit matrix what its codes stand for. Everything else is given
    as it is, sharded where it is sharded. One such matrix is alive at a time.

    Args:
        model: with layers of `models.lora` and `models.quantize`, or without.
    """
    model.state_dict()  # FSDP2 puts its shards back for it: what a forward left gathered may be in a lower dtype
    parts: list[tuple[str, Any]] = list(model.named_modules(remove_duplicate=False))
    adapted = {name: part for name, part in parts if hasattr(part, "base_layer")}
    for place, part in parts:
        if ".lora_" in place:
            continue
        owner = place.removesuffix(".base_layer") if place.endswith(".base_layer") else place
        layer = adapted.get(owner) if owner != place else None
        for leaf, tensor in _own(part):
            name = f"{owner}.{leaf}" if owner else leaf
            if leaf == "weight" and layer is not None:
                yield name, _merged(part, layer)
            elif hasattr(part, "matrix"):  # a `Linear4bit`, whose scales are not of this world
                packed: Any = part
                if leaf != "scale":
                    yield name, packed.matrix(torch.float32) if leaf == "weight" else tensor
            else:
                yield name, tensor


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own entries of a state dict."""
    yield from ((name, tensor.detach()) for name, tensor in module._parameters.items() if tensor is not None)
    left_out = module._non_persistent_buffers_set
    yield from ((n, b) for n, b in module._buffers.items() if b is not None and n not in left_out)


def _merged(base: Any, layer: Any) -> Tensor:
    known = hasattr(base, "matrix")
    result = base.matrix(torch.float32) if known else full(base.weight).detach().float().clone()
    for name in layer.active_adapters:
        a_RK, b_NR = (full(part[name].weight).detach().float() for part in (layer.lora_A, layer.lora_B))
        result += layer.scaling[name] * (b_NR @ a_RK)
    return result
