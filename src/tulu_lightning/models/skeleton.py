"""Networks built without weights and filled in place, so that no rank ever holds a whole one.

Inside `without_weights` a model is built on PyTorch's meta device: it has shapes, and no memory. It is changed (fewer layers,
adapters, 4 bits), split and sharded as usual, and `materialise` then gives each rank memory for its own part and reads
that part, and nothing else, from the safetensors files.

That takes files whose tensors are named as the model names them, which is so for all that `save_pretrained` writes of
a Llama, Qwen, Mistral and the like. For others `NotStreamedError` says so, and transformers loads them whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, PreTrainedModel

from tulu_lightning.models.lora import Lora, start_adapters
from tulu_lightning.models.quantize import Linear4bit
from tulu_lightning.models.streaming import WeightFiles
from tulu_lightning.models.weights import own_block

__all__ = [
    "NotStreamedError",
    "building_without_weights",
    "decoder_of",
    "mark",
    "materialise",
    "skeleton",
    "without_weights",
]

PIECE = 16 * 2**20
"""Bytes that are read at a time."""

_asked: ContextVar[bool] = ContextVar("without_weights", default=False)


class NotStreamedError(Exception):
    """A model cannot be filled straight from its files; the message says why."""


@contextmanager
def without_weights() -> Iterator[None]:
    """Models that load in this context get no weights, until `materialise`."""
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def building_without_weights() -> bool:
    """Whether models are to be built without weights."""
    return _asked.get()


def skeleton(
    kind: Any, folder: str | Path, dtype: torch.dtype, attention: str | None, **settings: Any
) -> tuple[PreTrainedModel, list[str]]:
    """A model on meta, with real buffers; a scalar head, which is small, is real too, and loaded.

    Args:
        kind: transformers' auto class.
        folder: the model folder.
        dtype: of the parameters.
        attention: name of a registered attention; transformers chooses if left out.
        settings: for the config.

    Returns:
        The model, and the names of parameters that the files lack.

    Raises:
        NotStreamedError: the files' names or shapes are not the model's, or it has buffers that cannot be made again.
        InputError: the files are damaged or missing.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **settings)
    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        model = kind.from_config(config, dtype=dtype, trust_remote_code=False, **chosen)
    files = WeightFiles(folder)
    missing = _missing(model, files)
    _restore_buffers(model)
    if isinstance(score := getattr(model, "score", None), nn.Linear):
        score.to_empty(device="cpu")
        nn.init.zeros_(score.weight)
        if "score.weight" in files:
            with torch.no_grad():
                score.weight.copy_(files.read("score.weight"))
    return model, missing


def _missing(model: PreTrainedModel, files: WeightFiles) -> list[str]:
    """Names of a model's parameters that its files lack; of tied ones one is enough."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    missing = []
    for names in places.values():
        stored = [name for name in names if name in files]
        if len(stored) > 1:
            raise NotStreamedError(f"its files have both {stored[0]} and {stored[1]}, which its config.json ties")
        if not stored:
            missing.append(names[0])
        elif files.shape(stored[0]) != tuple(model.get_parameter(names[0]).shape):
            raise NotStreamedError(f"{stored[0]} has another shape in its files than in its config.json")
    return sorted(missing)


def _restore_buffers(model: Any) -> None:
    """Give buffers their numbers: no file has those of rotary embeddings, and `to_empty` would leave noise."""
    for part in model.modules():
        if not any(buffer is not None and buffer.is_meta for buffer in part._buffers.values()):
            continue
        if not hasattr(part, "original_inv_freq"):  # transformers knows how to begin those anew, and few others
            raise NotStreamedError(f"{type(part).__name__} has buffers that no file has")
        part.to_empty(device="cpu", recurse=False)
        model._init_weights(part)


def mark(lm: PreTrainedModel, folder: str) -> None:
    """Note with each part of a model without weights where its tensors are stored: parts are taken out and wrapped later."""
    for name, part in lm.named_modules():
        if ".lora_" not in name and any(p is not None and p.is_meta for p in part._parameters.values()):
            place: Any = part
            place.stored_as = (folder, name.removesuffix(".base_layer"))


@torch.no_grad()
def materialise(
    module: nn.Module, device: torch.device, lora: Lora | None = None, buffers: torch.device | None = None
) -> None:
    """Give a network's parameters memory and numbers: this rank's part of them if they are sharded.

    One tensor's part at a time is held beside them; of a 4-bit layer one whole matrix, which is quantised.

    Args:
        module: with parameters on meta, marked; a network without any is left as it is.
        device: where to.
        lora: of the adapters in it.
        buffers: where buffers go, if elsewhere.

    Raises:
        InputError: a file is damaged.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for leaf, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                owners.setdefault(id(parameter), []).append((part, leaf))
    if not owners:
        return
    for places in owners.values():
        _allocate(places, device)
    for part in module.modules():
        nested: Any = part.nested if isinstance(part, Linear4bit) else None
        if nested is not None and nested.is_meta:
            part.nested = torch.empty_like(nested, device=buffers or device)
    module._apply(lambda tensor: tensor)  # FSDP2 takes note of its parameters' new memory
    files: dict[str, WeightFiles] = {}
    for places in owners.values():
        _read(places, files)
    if lora is not None:
        start_adapters(decoder_of(module), lora)


def decoder_of(module: nn.Module) -> nn.Module:
    """The decoder of a `PackedLM`, `PackedReward` or `PackedValue`."""
    wrapped: Any = module
    return wrapped.lm.get_decoder() if hasattr(wrapped, "lm") else wrapped.decoder


def _allocate(places: list[tuple[nn.Module, str]], device: torch.device) -> None:
    """Memory for one parameter, which tied layers go on sharing."""
    owner, leaf = places[0]
    old: Any = owner._parameters[leaf]
    fresh = nn.Parameter(torch.empty_like(old, device=device), requires_grad=old.requires_grad)
    for owner, leaf in places:
        owner._parameters[leaf] = fresh


def _read(places: list[tuple[nn.Module, str]], files: dict[str, WeightFiles]) -> None:
    """Fill one parameter from whichever of its names is stored; adapters have none."""
    absent = ""
    for owner, leaf in places:
        if (stored := getattr(owner, "stored_as", None)) is None:
            continue
        folder, prefix = stored
        if folder not in files:
            files[folder] = WeightFiles(folder)
        source = files[folder]
        name = f"{prefix}.{leaf}"
        if isinstance(owner, Linear4bit) and leaf != "bias":
            if leaf == "weight":
                owner.take(source.read(name))
            return
        if name in source:
            _copy(owner._parameters[leaf], source, name)
            return
        absent = f"{folder} does not hold {name}, which it did when the model was made"
    if absent:
        raise RuntimeError(absent)


def _copy(parameter: Any, source: WeightFiles, name: str) -> None:
    """Copy this rank's part of a tensor out of its file, some rows at a time."""
    local: Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if not local.numel():
        return
    if not local.ndim:
        local.copy_(source.read(name))
        return
    rows, *others = own_block(parameter)
    step = max(1, PIECE // max(local[0].nbytes, 1))
    for first in range(0, len(local), step):
        last = min(first + step, len(local))
        block = source.read_part(name, [slice(rows.start + first, rows.start + last), *others])
        # Through fp32, as models are loaded whole: a bf16 weight is what its fp32 one rounds to.
        local[first:last].copy_(block.float().to(local.dtype))
