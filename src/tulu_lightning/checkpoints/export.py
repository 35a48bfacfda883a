"""A Hugging Face folder of the policy: what the next stage, vLLM and everybody else can load."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tulu_lightning.models.weights import full, plain_weights

__all__ = ["export", "publish"]


def export(
    lm: PreTrainedModel,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    chat_template: str,
    stop_ids: tuple[int, ...],
) -> Path:
    """Write safetensors, config, tokenizer with its chat template, and a generation config with all stop ids.

    Written beside and renamed: the folder is whole or not there.

    Args:
        lm: the model whose config and class are written.
        state: its full state dict, on the CPU.
        tokenizer: as loaded; it is given the template it was trained with.
        folder: where to; replaced if it is there.
        chat_template: Jinja source.
        stop_ids: every token that ends a response.

    Returns:
        `folder`.
    """
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    kept: dict[str, Any] = {"implementation": lm.config._attn_implementation, "cache": lm.config.use_cache}
    try:
        lm.config._attn_implementation, lm.config.use_cache = "sdpa", True  # ours exist only inside this package
        lm.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=list(stop_ids), pad_token_id=tokenizer.pad_token_id
        )
        lm.save_pretrained(beside, state_dict=state)
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)  # half a folder would keep a full disk full
        raise
    finally:
        lm.config._attn_implementation, lm.config.use_cache = kept["implementation"], kept["cache"]
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(beside, folder)
    return folder


def full_state(lm: PreTrainedModel) -> dict[str, Tensor]:
    """The whole state dict on the CPU, adapters merged, gathered from shards where there are any.

    In fp32, unless every weight is stored in bf16.

    Gathering is a collective, and only the first rank keeps what comes of it. Of tied tensors only the first name is in
    it: the copies are no longer one piece of memory, so nothing downstream could tell that they are one tensor.
    """
    sharded = any(isinstance(p, DTensor) for p in lm.parameters())
    kept = not sharded or dist.get_rank() == 0
    every, first = ({name for name, _ in lm.named_parameters(remove_duplicate=once)} for once in (False, True))
    dtype = torch.bfloat16 if {p.dtype for p in lm.parameters()} == {torch.bfloat16} else torch.float32
    state: dict[str, Tensor] = {}
    for name, tensor in plain_weights(lm):
        if name not in every - first:
            whole = full(tensor.detach())
            if kept:
                state[name] = whole.to("cpu", dtype)
    return state


def publish(folder: Path, link: Path) -> None:
    """Point `link` at `folder` in one step: a reader sees the old or the new, never neither."""
    beside = link.with_name(f".{link.name}.tmp")
    beside.unlink(missing_ok=True)
    beside.symlink_to(os.path.relpath(folder, link.parent))
    beside.replace(link)
