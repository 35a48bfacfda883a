"""A Hugging Face folder of the policy or the reward model: what the next stage, vLLM and everybody else can load."""

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    """Write safetensors, config, tokenizer with its chat template, and what its readers must know of tokens.

    Of a language model that is a generation config with all stop ids. Of a reward model it is a padding token that no
    conversation ends with: transformers reads the reward at the last token that is not padding.
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
    tokenizer.chat_template = chat_template
    if not lm.can_generate():
        tokenizer = padded_apart(tokenizer, stop_ids)
    try:
        with _as_others_know_it(lm, tokenizer, stop_ids):
            lm.save_pretrained(beside, state_dict=state)
        tokenizer.save_pretrained(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)  # half a folder would keep a full disk full
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(beside, folder)
    return folder


@contextmanager
def _as_others_know_it(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...]) -> Iterator:
    """The config without what exists only inside this package, for as long as the context lasts."""
    config = lm.config
    names = {"_attn_implementation": "sdpa", "use_cache": True}
    if lm.can_generate():
        lm.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id, eos_token_id=list(stop_ids), pad_token_id=tokenizer.pad_token_id
        )
    else:
        names["pad_token_id"] = tokenizer.pad_token_id
    kept = {name: getattr(config, name, None) for name in names}
    try:
        for name, value in names.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(config, name, value)


def padded_apart(tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...]) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer whose padding token ends nothing: its own, or another special token.

    One whose name says that it is for padding goes first, then the lowest id. Without any the copy has no padding
    token, and a reward model reads one conversation at a time.
    """
    result = copy.deepcopy(tokenizer)
    if result.pad_token_id is None or result.pad_token_id in stop_ids:
        special = {i: str(t) for i, t in result.added_tokens_decoder.items() if t.special and i not in stop_ids}
        first = min(special, key=lambda i: ("pad" not in special[i].lower(), i), default=None)
        result.pad_token = None if first is None else special[first]
    return result


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
