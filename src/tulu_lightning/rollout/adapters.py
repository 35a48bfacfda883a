"""Adapters for vLLM: what is pushed while a frozen base stays where it is.

A push is a folder in peft's form, in shared memory where there is some, under a name of its own: a name that was used
before would find keys and values in the prefix cache that other adapters made.
"""

import json
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tulu_lightning.errors import InputError
from tulu_lightning.models.lora import Lora, targets_of
from tulu_lightning.rollout.adapter_proof import PREFIX
from tulu_lightning.rollout.delivery import Contents
from tulu_lightning.rollout.transport import shared_folder

__all__ = ["adapter_folder", "adapter_options", "new_name", "room_for"]

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for."""


def room_for(r: int) -> int:
    """The smallest rank of vLLM's that holds adapters of rank r.

    Raises:
        InputError: there is none.
    """
    if r > RANKS[-1]:
        what = f"is {r}, and vLLM has room for adapters of rank {RANKS[-1]} at most"
        raise InputError("lora.r", what, "Lower it, or use rollout.engine.push: merged.")
    return next(room for room in RANKS if room >= r)


def adapter_options(lora: Lora, contents: Contents) -> dict[str, Any]:
    """Settings with which vLLM holds one adapter.

    Targets are named because it would wrap the head as well, and then fails (0.32) at scores of several prompts at once.

    Args:
        lora: its settings.
        contents: from `delivery.contents_of` with these settings.
    """
    return {
        "enable_lora": True,
        "max_lora_rank": room_for(lora.r),
        "max_loras": 1,
        "max_cpu_loras": 1,
        "lora_target_modules": targets_of(contents.shapes),
    }


def new_name(version: int) -> str:
    """A name that no push had before, of this run or another one."""
    return f"tulu-{version}-{uuid.uuid4().hex[:8]}"


@contextmanager
def adapter_folder(named: Iterable[tuple[str, Tensor]], lora: Lora) -> Iterator[str]:
    """A folder with adapters in peft's form, for as long as the context lasts.

    Args:
        named: adapters, each as whole as vLLM wants it, in the engine's dtype.
        lora: their settings.
    """
    folder = Path(tempfile.mkdtemp(prefix="tulu-adapter-", dir=shared_folder()))
    try:
        tensors = {PREFIX + name: tensor.contiguous().cpu() for name, tensor in named}
        save_file(tensors, folder / "adapter_model.safetensors")
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": lora.r,
            "lora_alpha": lora.alpha,
            "use_rslora": lora.rslora,
            "target_modules": targets_of(tensors),
        }
        (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
