"""A Hugging Face folder of the policy: what the next stage, vLLM and everybody else can load."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

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
    """The whole state dict on the CPU, gathered from shards where there are any (a collective then).

    Of tied tensors only the first name is in it: the copies are no longer one piece of memory, so nothing downstream
    could tell that they are one tensor.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if any(hasattr(p, "full_tensor") for p in lm.parameters()):
        state: dict[str, Any] = get_model_state_dict(
            lm, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
    else:
        state = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in lm.state_dict().items()}
    every, first = ({name for name, _ in lm.named_parameters(remove_duplicate=once)} for once in (False, True))
    return {name: tensor for name, tensor in state.items() if name not in every - first}


def publish(folder: Path, link: Path) -> None:
    """Point `link` at `folder` in one step: a reader sees the old or the new, never neither."""
    beside = link.with_name(f".{link.name}.tmp")
    beside.unlink(missing_ok=True)
    beside.symlink_to(os.path.relpath(folder, link.parent))
    beside.replace(link)
