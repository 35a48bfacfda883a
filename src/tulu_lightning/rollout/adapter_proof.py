"""Inside vLLM: whether its layers hold the adapters of a folder. Imports nothing of vLLM, as `rollout.held_weights`.

vLLM copies each pair into the room of its slot, `[slots, 1, largest rank, inputs]` and `[slots, 1, outputs, largest rank]`, B
multiplied by the scale, and leaves the rest of the room 0. So all elements can be compared, those of layers that have no
adapter with 0: what an earlier adapter left there would be added to every product.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tulu_lightning.models.lora import Lora
from tulu_lightning.rollout.fingerprint import mark
from tulu_lightning.rollout.held_weights import shard_of

__all__ = ["PREFIX", "compare_adapter"]

PREFIX = "base_model.model."
"""Of names in peft's files."""


def compare_adapter(runner: Any, folder: Path) -> dict[str, Any]:
    """Compare what a folder says with what the layers compute with.

    Args:
        runner: vLLM's model runner, which has loaded the folder.
        folder: in peft's form.

    Returns:
        A `vllm_worker.Report`, as a dict.
    """
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    scale = Lora(r=settings["r"], alpha=settings["lora_alpha"], rslora=settings["use_rslora"]).scale
    sent = {name.removeprefix(PREFIX): x for name, x in load_file(folder / "adapter_model.safetensors").items()}
    manager = runner.lora_manager._adapter_manager
    slots = [slot for slot, number in enumerate(manager.lora_index_to_id) if number is not None]
    fused: Mapping[str, list[str]] = getattr(runner.get_model(), "packed_modules_mapping", None) or {}
    found, differ = set[str](), list[str]()
    for name, room, shard in _rooms(manager.modules, fused):
        found.add(name)
        if len(slots) != 1 or not torch.equal(room[slots[0], 0], _wanted(room, sent.get(name), name, scale, shard)):
            differ.append(name)
    differ += [name for name in sent if name not in found]
    return {"received": {name: mark(x) for name, x in sent.items()}, "differ": differ, "unproved": []}


def _rooms(modules: Mapping[str, Any], fused: Mapping[str, list[str]]) -> Iterator[tuple[str, Tensor, int]]:
    """Adapters that there is room for: name, room, and which share of it this worker has if it is cut."""
    for path, module in modules.items():
        owner, _, leaf = path.rpartition(".")
        parts = fused.get(leaf, [leaf])
        rooms = getattr(module, "lora_a_stacked", ()), getattr(module, "lora_b_stacked", ())
        for i, (part, *pair) in enumerate(zip(parts, *rooms, strict=False)):
            for kind, room in zip("AB", pair, strict=True):
                yield f"{owner}.{part}.lora_{kind}.weight", room, shard_of(getattr(module, "base_layer", module), i)


def _wanted(room: Tensor, sent: Tensor | None, name: str, scale: float, shard: int) -> Tensor:
    """What a slot has to hold: of a layer whose outputs are cut some rows of B, of one whose inputs are, some columns of A."""
    wanted = torch.zeros_like(room[0, 0])
    if sent is None:
        return wanted
    own_rows, own_columns = wanted.shape
    if ".lora_B." in name:
        value = (sent[shard * own_rows :][:own_rows] if len(sent) > own_rows else sent).to(room) * scale
    else:
        value = (sent[:, shard * own_columns :][:, :own_columns] if sent.shape[1] > own_columns else sent).to(room)
    wanted[: value.shape[0], : value.shape[1]] = value
    return wanted
