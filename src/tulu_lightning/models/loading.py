"""Weights from a Hugging Face folder, whole or not at all."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tulu_lightning.errors import InputError

__all__ = ["decoder_layers", "load_causal_lm"]


def load_causal_lm(folder: str | Path, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """Load a causal LM from a local folder, from safetensors, without running code of the folder.

    Args:
        folder: the model folder.
        dtype: of the weights.
        attention: name of a registered attention; transformers chooses if left out.

    Raises:
        InputError: a file is damaged or of another architecture, tensors are missing (transformers would fill them
            with random numbers), or the architecture does not take the attention.
    """
    chosen: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    remedy = "Save or copy the model again (save_pretrained), or give another one."
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **chosen,
        )
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(str(folder), f"its weights do not load ({_first_line(error)})", remedy) from error
    lm, report = loaded
    if missing := sorted(report["missing_keys"]):
        what = f"its weights lack {len(missing)} tensors, the first is {missing[0]}"
        raise InputError(str(folder), what, remedy)
    return lm


def decoder_layers(decoder: nn.Module, name: str) -> nn.ModuleList:
    """The decoder's list of layers.

    Args:
        decoder: of any architecture.
        name: what to call the model in the message.

    Raises:
        InputError: the architecture keeps them under another name than `layers`.
    """
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        what = f"{type(decoder).__name__} does not keep its decoder layers under `layers`"
        raise InputError(name, what, "It can be trained whole on one process only: leave out `layers` and fsdp2.")
    return layers


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
