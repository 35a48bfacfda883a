"""Shapes of models, from their config.json where it is on this machine, else of the ones that the configs name."""

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from tulu_lightning.assets.models import NAMED_MODELS, resolve_model
from tulu_lightning.core.memory import Architecture
from tulu_lightning.errors import InputError

__all__ = ["KNOWN", "find_architecture"]

KNOWN = {
    "8B": Architecture(4096, 14336, 32, 4096, 1024, 128_256, False),
    "70B": Architecture(8192, 28672, 80, 8192, 1024, 128_256, False),
    "405B": Architecture(16384, 53248, 126, 16384, 1024, 128_256, False),
}
"""Llama 3.1, and what Tülu 3 made of it (config.json of meta-llama/Llama-3.1-*)."""

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Names that mixtures of experts give their number in config.json."""


def find_architecture(path: str, experts: bool = False) -> Architecture:
    """Shapes of a model folder, a named model, or a Llama 3.1 or Tülu 3 on the hub; no weights are read.

    Args:
        path: of the model.
        experts: whether a mixture of experts will do, of which the MLPs are those of one expert.

    Raises:
        InputError: it is none of these, its config.json lacks a number, or it is a mixture of experts.
    """
    if path not in NAMED_MODELS and not Path(path).is_dir():
        for size, shapes in KNOWN.items():
            if any(name in path for name in (f"Llama-3.1-{size}", f"Tulu-3-{size}", f"Tulu-3.1-{size}")) or (
                path.startswith("allenai/Llama-3.1-Tulu-3") and f"-{size}" in path
            ):
                return shapes
        remedy = "Give a model folder (its config.json is read), or a Llama 3.1 or Tülu 3 of 8B, 70B or 405B."
        raise InputError(path, "its shapes are not known, and the hub is not asked", remedy)
    folder = Path(path) if Path(path, "config.json").is_file() else resolve_model(path)
    config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    many = next((name for name in EXPERTS if (config.get(name) or 1) > 1), None)
    if many is not None and not experts:
        what = f"has {many} {config[many]}: a mixture of experts, whose shapes are not reckoned with"
        raise InputError(str(folder / "config.json"), what, "Plan for a dense, Llama-like model.")
    try:
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        return Architecture(
            config["hidden_size"],
            config["intermediate_size"],
            config["num_hidden_layers"],
            heads * size,
            (config.get("num_key_value_heads") or heads) * size,
            config["vocab_size"],
            _is_tied(config),
        )
    except KeyError as error:
        raise InputError(str(folder / "config.json"), f"has no {error}", "Plan for a Llama-like model.") from None


def _is_tied(config: Any) -> bool:
    """Whether the head is the embedding; where config.json does not say, as its kind of model has it by itself."""
    if "tie_word_embeddings" in config:
        return bool(config["tie_word_embeddings"])
    kind = config.get("model_type")
    return kind in CONFIG_MAPPING and bool(CONFIG_MAPPING[kind]().tie_word_embeddings)
