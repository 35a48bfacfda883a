"""Weights from a Hugging Face folder, whole or not at all."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from tulu_lightning.errors import InputError
from tulu_lightning.models.limits import read_config
from tulu_lightning.models.skeleton import NotStreamedError, building_without_weights, skeleton

__all__ = ["SCORE", "decoder_layers", "is_classifier", "load_causal_lm", "load_scorer"]

SCORE = "score.weight"
"""What transformers' sequence classifiers call the weight of their head."""
REMEDY = "Save or copy the model again (save_pretrained), or give another one."


def is_classifier(folder: str | Path) -> bool:
    """Whether a model folder holds a sequence classifier, as reward models are saved, by its config.json.

    Raises:
        InputError: the config does not load.
    """
    names = read_config(str(folder)).architectures or [""]
    return names[0].endswith("ForSequenceClassification")


def load_causal_lm(folder: str | Path, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """Load a causal LM from a local folder, from safetensors, without running code of the folder.

    Inside `skeleton.without_weights` it gets none yet.

    Args:
        folder: the model folder.
        dtype: of the weights.
        attention: name of a registered attention; transformers chooses if left out.

    Raises:
        InputError: a file is damaged or of another architecture, tensors are missing (transformers would fill them
            with random numbers), the architecture does not take the attention, or it is a reward model.
    """
    if is_classifier(folder):
        what = "it is a reward model or another classifier, which has no words to say"
        raise InputError(str(folder), what, "Give a causal language model; a reward model can start a critic.")
    lm, missing = _load(AutoModelForCausalLM, folder, dtype, attention)
    _refuse_missing(folder, missing)
    return lm


def load_scorer(folder: str | Path, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """A sequence classifier with one label: a reward model with its head, or a causal LM with any numbers for one.

    The output head of the LM is left out. The random state stays as it was. Arguments as in `load_causal_lm`.

    Raises:
        InputError: as there, or transformers has no classifier of the architecture with one matrix as its head.
    """
    with torch.random.fork_rng(devices=[]):  # transformers draws the head that a causal LM lacks
        model, missing = _load(AutoModelForSequenceClassification, folder, dtype, attention, num_labels=1)
    _refuse_missing(folder, missing if is_classifier(folder) else [name for name in missing if name != SCORE])
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear) or score.bias is not None:
        what = f"the head of {type(model).__name__} is not one matrix without a bias"
        raise InputError(str(folder), what, "Give a Llama, Qwen 2 or 3, Mistral or the like.")
    return model


def _load(
    kind: Any, folder: str | Path, dtype: torch.dtype, attention: str | None, **settings: Any
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of the tensors that its files lack."""
    chosen: dict[str, Any] = settings if attention is None else {"attn_implementation": attention, **settings}
    try:
        if building_without_weights():
            model, missing = skeleton(kind, folder, dtype, attention, **settings)
            if any(name != SCORE for name in missing):
                raise NotStreamedError(f"its files have no {missing[0]}")
            return model, missing
        model, report = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **chosen,
        )
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(str(folder), f"its weights do not load ({_first_line(error)})", REMEDY) from error
    return model, sorted(report["missing_keys"])


def _refuse_missing(folder: str | Path, missing: list[str]) -> None:
    if missing:
        what = f"its weights lack {len(missing)} tensors, the first is {missing[0]}"
        raise InputError(str(folder), what, REMEDY)


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
