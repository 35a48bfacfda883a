"""A Hugging Face folder, or a peft adapter, out of a training checkpoint: tensor by tensor, without a network in memory."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tulu_lightning.checkpoints.export import as_files_name_them, write_beside_weights
from tulu_lightning.checkpoints.reading import TrainingCheckpoint
from tulu_lightning.checkpoints.shards import SHARD_BYTES, save_tensors, write_shards
from tulu_lightning.errors import InputError
from tulu_lightning.files import put_in_place
from tulu_lightning.models.limits import read_config
from tulu_lightning.models.lora import Lora, targets_of
from tulu_lightning.models.quantize import Linear4bit, Quantize

__all__ = ["Layout", "write_adapter", "write_model"]

PREFIX = "policy.lm."
"""Of the trained network's tensors in a checkpoint."""
A, B = ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True)
class Layout:
    """What a checkpoint does not say of itself, from the run's config."""

    start: str
    """Folder that the run started from."""
    layers: int | None = None
    lora: Lora | None = None
    quantize: Quantize | None = None
    scorer: bool = False
    """Whether it is a reward model."""
    weights_dtype: str = "float32"

    @property
    def dtype(self) -> torch.dtype:
        """What an export writes if nothing else is asked for: bf16 where every weight is stored so, else fp32."""
        low = self.weights_dtype == "bfloat16" and self.lora is None and not self.scorer
        return torch.bfloat16 if low else torch.float32


def write_model(
    checkpoint: TrainingCheckpoint,
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    chat_template: str,
    stop_ids: tuple[int, ...],
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    extra: Callable[[Path], None] = lambda folder: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a Hugging Face folder; adapters are merged in fp32, 4-bit matrices written as what their codes stand for.

    Args:
        checkpoint: of an SFT, DPO, PPO or reward-model run.
        layout: from its config.
        tokenizer: of the start.
        out: where to: written beside and renamed.
        chat_template: Jinja source.
        stop_ids: every token that ends a response.
        dtype: of the weights; left out, as they were trained: fp32, or bf16 where they were stored so.
        max_shard_bytes: of a file of weights.
        extra: writes further files into the folder before it gets its name.
        progress: called with (tensors, all tensors).

    Raises:
        InputError: the checkpoint is of another model, or damaged.
    """
    lm = _skeleton(layout)
    dtype = dtype or layout.dtype
    names = list(_names(lm))

    def told() -> Iterator[tuple[str, Tensor]]:
        for done, name in enumerate(names, start=1):
            yield name, _plain(checkpoint, layout, lm, name)
            progress(done, len(names))

    def write(folder: Path) -> None:
        write_shards(as_files_name_them(lm, told()), folder, max_shard_bytes, dtype)
        write_beside_weights(lm, tokenizer, folder, chat_template, stop_ids, dtype)
        extra(folder)

    return _beside(out, write)


def write_adapter(
    checkpoint: TrainingCheckpoint,
    layout: Layout,
    base: str,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    chat_template: str,
    extra: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write a peft adapter: what was trained, and the settings that say where it goes.

    Args:
        checkpoint: of a run with LoRA.
        layout: from its config.
        base: what the adapter is to be put on, for adapter_config.json: a folder or hub id.
        tokenizer: of the start.
        out: where to: written beside and renamed.
        chat_template: Jinja source.
        extra: writes further files into the folder before it gets its name.

    Raises:
        InputError: the run has no adapters.
    """
    if layout.lora is None:
        remedy = "Leave out --adapter: the whole model was trained."
        raise InputError(str(checkpoint.path), "is of a run without LoRA, so there is no adapter", remedy)
    from peft import LoraConfig

    lora = layout.lora
    names = [name for name in checkpoint.names if name.startswith(PREFIX) and ".lora_" in name]
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=targets_of(names),
        lora_dropout=0.0,
        use_rslora=lora.rslora,
        task_type="SEQ_CLS" if layout.scorer else "CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )  # type: ignore[call-arg]
    tensors = {
        "base_model.model." + name.removeprefix(PREFIX).replace(".default.", "."): checkpoint.read(name).clone()
        for name in names
    }
    if layout.scorer:  # its head is trained whole beside the adapters
        tensors["base_model.model.score.weight"] = checkpoint.read(f"{PREFIX}score.weight").clone()

    def write(folder: Path) -> None:
        save_tensors(tensors, folder / "adapter_model.safetensors")
        settings.save_pretrained(str(folder))
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(folder)
        extra(folder)

    return _beside(out, write)


def _beside(out: Path, write: Callable[[Path], None]) -> Path:
    beside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        write(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    put_in_place(beside, out)
    return out


def _skeleton(layout: Layout) -> PreTrainedModel:
    """The architecture on meta: names, shapes and config, no numbers."""
    config: Any = read_config(layout.start)
    if layout.layers is not None:
        config.get_text_config(decoder=True).num_hidden_layers = layout.layers
    kind: Any = AutoModelForCausalLM
    if layout.scorer:
        kind, config.num_labels = AutoModelForSequenceClassification, 1
    with torch.device("meta"):
        return kind.from_config(config, trust_remote_code=False)


def _names(lm: PreTrainedModel) -> Iterator[str]:
    """Of the state dict, tied tensors once."""
    every, first = ({name for name, _ in lm.named_parameters(remove_duplicate=once)} for once in (False, True))
    return (name for name in lm.state_dict() if name not in every - first)


def _plain(checkpoint: TrainingCheckpoint, layout: Layout, lm: PreTrainedModel, name: str) -> Tensor:
    """One tensor as it would be without adapters and without 4 bits."""
    stem = name.removesuffix(".weight")
    known = set(checkpoint.names)
    adapted = PREFIX + stem + A in known
    if PREFIX + name in known:
        whole = checkpoint.read(PREFIX + name)
    elif PREFIX + stem + ".base_layer.weight" in known:
        whole = checkpoint.read(PREFIX + stem + ".base_layer.weight")
    elif layout.quantize is not None:  # what is frozen in 4 bits is the start, and is in no checkpoint
        whole = _from_start(layout, lm, name)
    else:
        remedy = "Export with the config of the run that made it."
        raise InputError(str(checkpoint.path), f"has no tensor {PREFIX}{name}", remedy)
    expected = lm.get_parameter(name).shape if name in dict(lm.named_parameters()) else whole.shape
    if whole.shape != expected:
        what = f"{PREFIX}{name} has the shape {list(whole.shape)}, and {layout.start} has {list(expected)} there"
        raise InputError(str(checkpoint.path), what, "Export with the config of the run that made it.")
    return _merged(checkpoint, layout.lora, stem, whole) if adapted else whole


def _merged(checkpoint: TrainingCheckpoint, lora: Lora | None, stem: str, base_NK: Tensor) -> Tensor:
    assert lora is not None
    a_RK, b_NR = (checkpoint.read(PREFIX + stem + side).float() for side in (A, B))
    return base_NK.float() + lora.scale * (b_NR @ a_RK)


def _from_start(layout: Layout, lm: PreTrainedModel, name: str) -> Tensor:
    """A tensor of the start's files; of a matrix that was quantised, what its codes stand for."""
    folder = Path(layout.start)
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            file = folder / json.loads(index.read_text(encoding="utf-8"))["weight_map"][name]
        else:
            file = folder / "model.safetensors"
        with safe_open(file, "pt") as opened:
            whole = opened.get_tensor(name).float()
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        what = f"{name} cannot be read from it ({error})"
        raise InputError(layout.start, what, "Give back the model that the run started from.") from error
    owner: Any = lm.get_submodule(name.rpartition(".")[0])
    decoder: Any = lm.get_decoder()
    if (
        layout.quantize is not None
        and isinstance(owner, nn.Linear)
        and any(part is owner for part in decoder.modules())
    ):
        linear = nn.Linear(whole.shape[1], whole.shape[0], bias=False)
        linear.weight = nn.Parameter(whole, requires_grad=False)
        return Linear4bit(linear, layout.quantize).matrix(torch.float32)
    return whole.to(getattr(torch, layout.weights_dtype)).float()  # as the run kept it
