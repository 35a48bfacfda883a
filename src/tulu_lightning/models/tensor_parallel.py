"""Tensor parallelism (Shoeybi et al. 2019) for Llama-like decoders: each rank computes some heads and some of every MLP.

Queries, keys, values, gates and ups are split by their outputs, the two matrices behind them by their inputs; a layer's
ranks add up their halves of its result twice a pass. Everything between layers (hidden states, norms, embedding, output
head, log-probs) is computed by all of them, on the same rows. So packed attention runs as it is, on fewer heads.

What stays whole is sharded over all ranks (`models.mesh.Meshes.whole`); the norms of a layer with the layer.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from tulu_lightning.core.matmul import linear
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.models.loading import decoder_layers

__all__ = ["check_splits", "split"]

COLUMNS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
ROWS = {"self_attn": ("o_proj",), "mlp": ("down_proj",)}
KEY = "trainer.strategy.init_args.tensor_parallel"
REMEDY = "Use Llama, Mistral or Qwen 2, or leave tensor_parallel out: fsdp2 shards every model over all ranks."


def check_splits(config: Backbone, decoder: nn.Module, ranks: int) -> None:
    """Refuse what cannot be split over so many ranks.

    Args:
        config: the network's settings.
        decoder: its decoder, with or without weights.
        ranks: of one forward.

    Raises:
        InputError: heads, key heads or the MLP's width do not divide, or adapters or 4 bits are asked for.
    """
    if config.lora is not None:
        what = f"is {ranks}, and backbone.lora is set: adapters are not split"
        raise InputError(KEY, what, "Leave one of them out: with frozen weights fsdp2 alone takes little memory.")
    if config.compile:
        raise InputError(KEY, f"is {ranks}, and backbone.compile is true", "Leave one of them out.")
    shape: Any = decoder.config
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(shape, name, None)
        if size is None:
            raise InputError(KEY, f"is {ranks}, and the config.json of {config.path} has no {name}", REMEDY)
        if size % ranks:
            what = f"is {ranks}, and {name} of {config.path} is {size}, not a multiple of it"
            raise InputError(KEY, what, "Use a number that divides it.")


def split(decoder: nn.Module, mesh: DeviceMesh, name: str) -> None:
    """Split the layers of a decoder in place; parameters become sharded tensors, on meta or with their numbers.

    Args:
        decoder: whole, the same on all ranks.
        mesh: of the ranks that compute together; one axis.
        name: what to call the model in the message.

    Raises:
        InputError: its layers are not attention and a gated MLP as Llama's are.
    """
    for layer in decoder_layers(decoder, name):
        for place, columns in COLUMNS.items():
            part = getattr(layer, place, None)
            known = {*columns, *ROWS[place]}
            found = {n for n, child in part.named_modules() if child._parameters} if part is not None else set()
            if part is None or found != known or not all(isinstance(part.get_submodule(n), nn.Linear) for n in known):
                what = f"is set, and the {place} of {type(decoder).__name__} is not made of {', '.join(sorted(known))}"
                raise InputError(KEY, what, REMEDY)
            for leaf in columns:
                _split(part.get_submodule(leaf), mesh, _Column, {"weight": 0, "bias": 0})
            for leaf in ROWS[place]:
                _split(part.get_submodule(leaf), mesh, _Row, {"weight": 1})
            part.register_forward_pre_hook(_Entry(mesh), with_kwargs=True)


def _split(part: nn.Module, mesh: DeviceMesh, kind: type["_Column"] | type["_Row"], dims: dict[str, int]) -> None:
    part.__class__ = kind
    changed: Any = part
    changed.group = mesh.get_group()
    for leaf, dim in dims.items():
        if (whole := part._parameters.get(leaf)) is None:
            continue
        own = whole.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
        spread = DTensor.from_local(own, mesh, [Shard(dim)], run_check=False)
        part._parameters[leaf] = nn.Parameter(spread, requires_grad=whole.requires_grad)


class _Column(nn.Linear):
    """Some of a layer's outputs, from all its inputs."""

    group: Any

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, _own(self.weight), _own(self.bias))


class _Row(nn.Linear):
    """All of a layer's outputs, from some of its inputs on each rank."""

    group: Any

    def forward(self, input: Tensor) -> Tensor:
        total = _Sum.apply(linear(input, _own(self.weight), None), self.group)
        return total if self.bias is None else total + self.bias


def _own(tensor: Any) -> Any:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _Entry:
    """A hook on what is split: hidden states go in to all its ranks, so their gradient is the sum over them."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group = mesh.get_group()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (_Spread.apply(args[0], self.group), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _Spread.apply(kwargs["hidden_states"], self.group)}


class _Spread(torch.autograd.Function):
    """Itself; its gradient is summed over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _total(grads[0], ctx.group), None


class _Sum(torch.autograd.Function):
    """The sum over the group; the gradient is the same for all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _total(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0], None


def _total(x: Tensor, group: Any) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
