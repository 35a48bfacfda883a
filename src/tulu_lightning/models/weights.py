"""The weights of a model as everybody else names them: 4-bit matrices read, adapters merged, shards gathered."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

__all__ = ["fill", "full", "plain_weights"]


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if it is sharded (then all ranks must call)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into another, or this rank's part of it if that is sharded.

    Args:
        target: plain, or sharded evenly by FSDP2.
        whole: of the same shape.
    """
    if not isinstance(target, DTensor):
        target.copy_(whole)
        return
    shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    own = whole[tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))]
    target.to_local().copy_(own)


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
