"""The weights of a model as everybody else names them: adapters merged, shards gathered."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["full", "plain_weights"]


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if it is sharded (then all ranks must call)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def plain_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a state dict without adapters: `W + scaling · B A` in fp32 stands where W was.

    What has no adapter is given as it is, sharded where it is sharded. One merged matrix is alive at a time.

    Args:
        model: with LoRA layers of `models.lora`, or without.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        owner, inside, leaf = name.rpartition(".base_layer.")
        if inside and leaf == "weight":
            yield f"{owner}.weight", _merged(tensor, modules[owner])
        elif inside:
            yield f"{owner}.{leaf}", tensor
        elif ".lora_" not in name:
            yield name, tensor


def _merged(weight: Tensor, layer: Any) -> Tensor:
    result = full(weight).detach().float().clone()
    for name in layer.active_adapters:
        a_RK, b_NR = (full(part[name].weight).detach().float() for part in (layer.lora_A, layer.lora_B))
        result += layer.scaling[name] * (b_NR @ a_RK)
    return result
