"""Inside vLLM: whether its layers hold the adapters of a folder. Imports nothing of vLLM, as `rollout.vllm_worker`.

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

from tulu_lightning.rollout.fingerprint import mark

__all__ = ["compare_adapter"]

PREFIX = "base_model.model."
"""Of names in peft's files."""


def compare_adapter(runner: Any, folder: Path) -> dict[str, Any]:
    """Compare what a folder says with what the layers compute with.

    Args:
        runner: vLLM's model runner, which has loaded the folder.
        folder: in peft's form.

    Returns:
        A `vllm_worker.Report`, as a dict. Unproved are layers that tensor parallelism has cut.
    """
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    r, alpha = settings["r"], settings["lora_alpha"]
    scale = alpha / (r**0.5 if settings["use_rslora"] else r)
    sent = {name.removeprefix(PREFIX): x for name, x in load_file(folder / "adapter_model.safetensors").items()}
    manager = runner.lora_manager._adapter_manager
    slots = [slot for slot, number in enumerate(manager.lora_index_to_id) if number is not None]
    fused: Mapping[str, list[str]] = getattr(runner.get_model(), "packed_modules_mapping", None) or {}
    found, differ, unproved = set[str](), list[str](), list[str]()
    for name, room, is_cut in _rooms(manager.modules, fused):
        found.add(name)
        if is_cut:
            unproved += [name] if name in sent else []
        elif len(slots) != 1 or not torch.equal(room[slots[0], 0], _wanted(room, sent.get(name), name, scale)):
            differ.append(name)
    differ += [name for name in sent if name not in found]
    return {"received": {name: mark(x) for name, x in sent.items()}, "differ": differ, "unproved": unproved}


def _rooms(modules: Mapping[str, Any], fused: Mapping[str, list[str]]) -> Iterator[tuple[str, Tensor, bool]]:
    """Adapters that there is room for: name, room, and whether this worker has only a share of it."""
    for path, module in modules.items():
        owner, _, leaf = path.rpartition(".")
        parts = fused.get(leaf, [leaf])
        rooms = getattr(module, "lora_a_stacked", ()), getattr(module, "lora_b_stacked", ())
        for part, *pair in zip(parts, *rooms, strict=False):
            for kind, room in zip("AB", pair, strict=True):
                yield f"{owner}.{part}.lora_{kind}.weight", room, getattr(module, "tp_size", 1) > 1


def _wanted(room: Tensor, sent: Tensor | None, name: str, scale: float) -> Tensor:
    """What a slot has to hold."""
    wanted = torch.zeros_like(room[0, 0])
    if sent is not None:
        value = sent.to(room)
        wanted[: sent.shape[0], : sent.shape[1]] = value * scale if ".lora_B." in name else value
    return wanted
