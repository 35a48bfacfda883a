"""A Hugging Face folder of the policy or the reward model: what the next stage, vLLM and everybody else can load."""

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import WeightRenaming, revert_weight_conversion

from tulu_lightning.checkpoints.shards import SHARD_BYTES, ShardWriter
from tulu_lightning.files import put_in_place
from tulu_lightning.models.weights import full, plain_weights

__all__ = ["as_files_name_them", "export", "publish", "weights_of", "write_beside_weights"]


def export(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    chat_template: str,
    stop_ids: tuple[int, ...],
    max_shard_bytes: int = SHARD_BYTES,
    extra: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write safetensors, config, tokenizer with its chat template, and what its readers must know of tokens.

    Of a language model that is a generation config with all stop ids. Of a reward model it is a padding token that no
    conversation ends with: transformers reads the reward at the last token that is not padding.
    Written beside and renamed: the folder is whole or not there.

    Of a sharded model all ranks call this. Tensors are gathered one at a time, and each rank writes every so manieth file,
    so none holds more than a file and a tensor.

    Args:
        lm: the model: its weights, adapters merged, in fp32, or in bf16 where every weight is stored so.
        tokenizer: as loaded; it is given the template it was trained with.
        folder: where to; replaced if it is there.
        chat_template: Jinja source.
        stop_ids: every token that ends a response.
        max_shard_bytes: of a file of weights.
        extra: writes further files into the folder, on the first rank, before it gets its name.

    Returns:
        `folder`.
    """
    rank, ranks = _place(lm)
    beside = folder.with_name(f".{folder.name}.tmp")
    if rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    _wait(ranks)
    try:
        writer = ShardWriter(beside, max_shard_bytes, rank, ranks)
        for name, tensor in weights_of(lm):
            writer.add(name, tensor)
        writer.finish()
        _wait(ranks)
        if rank == 0:
            writer.name_files()
            write_beside_weights(lm, tokenizer, beside, chat_template, stop_ids, stored_dtype(lm))
            extra(beside)
            put_in_place(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)  # half a folder would keep a full disk full
        raise
    _wait(ranks)
    return folder


def write_beside_weights(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    chat_template: str,
    stop_ids: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """Write everything of a Hugging Face folder but the weights, which have that dtype.

    Other arguments as of `export`; `lm` may be on meta.
    """
    tokenizer.chat_template = chat_template
    if not lm.can_generate():
        tokenizer = padded_apart(tokenizer, stop_ids)
    with _as_others_know_it(lm, tokenizer, stop_ids, dtype):
        lm.config.save_pretrained(folder)
        if lm.can_generate():
            lm.generation_config.save_pretrained(folder)  # type: ignore[union-attr]
    tokenizer.save_pretrained(folder)


def _place(lm: PreTrainedModel) -> tuple[int, int]:
    """This rank and the number of ranks that write a model together."""
    sharded = any(isinstance(parameter, DTensor) for parameter in lm.parameters())
    return (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)


def _wait(ranks: int) -> None:
    if ranks > 1:
        dist.barrier()


@contextmanager
def _as_others_know_it(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...], dtype: torch.dtype
) -> Iterator:
    """The config without what exists only inside this package, for as long as the context lasts."""
    config = lm.config
    names: dict[str, Any] = {"_attn_implementation": "sdpa", "use_cache": True, "dtype": dtype}
    names["architectures"] = [type(lm).__name__.removeprefix("FSDP")]  # save_pretrained of a model would set it
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


def weights_of(lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors as transformers' files have them, adapters merged, gathered one at a time.

    In fp32, unless every weight is stored in bf16. Gathering is a collective: of a sharded model all ranks must go
    through it. Of tied tensors only the first name is there: the copies are no longer one piece of memory, so nothing
    downstream could tell that they are one tensor.
    """
    every, first = ({name for name, _ in lm.named_parameters(remove_duplicate=once)} for once in (False, True))
    dtype = stored_dtype(lm)
    plain = ((name, full(tensor.detach()).to(dtype)) for name, tensor in plain_weights(lm) if name not in every - first)
    yield from as_files_name_them(lm, plain)


def stored_dtype(lm: PreTrainedModel) -> torch.dtype:
    """What an export writes: bf16 where every weight is stored so, else fp32."""
    return torch.bfloat16 if {p.dtype for p in lm.parameters()} == {torch.bfloat16} else torch.float32


def as_files_name_them(lm: PreTrainedModel, plain: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Weights as the architecture's files have them, where transformers renames or merges some when it loads them."""
    conversions = getattr(lm, "_weight_conversions", None)
    if not conversions:
        yield from plain
    elif all(isinstance(each, WeightRenaming) for each in conversions):
        for name, tensor in plain:
            yield from revert_weight_conversion(lm, {name: tensor}).items()
    else:  # such as the experts of a mixture, which are one tensor here and many there: all of them are needed
        yield from revert_weight_conversion(lm, dict(plain)).items()


def publish(folder: Path, link: Path) -> None:
    """Point `link` at `folder` in one step: a reader sees the old or the new, never neither."""
    beside = link.with_name(f".{link.name}.tmp")
    beside.unlink(missing_ok=True)
    beside.symlink_to(os.path.relpath(folder, link.parent))
    beside.replace(link)
