"""Where a model comes from: a local Hugging Face folder, one of two names that are built into the cache, or the hub.

The hub is asked only for a path that is no folder here and looks like a hub id. No code of a model folder is run.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tulu_lightning.assets import hub, smollm2, tiny
from tulu_lightning.errors import InputError, nearest

__all__ = ["NAMED_MODELS", "generation_eos", "load_tokenizer", "resolve_model"]

NAMED_MODELS = {smollm2.NAME: smollm2.folder, tiny.NAME: tiny.folder}
"""Models that have a name; each function returns the finished folder and builds it first if it is missing."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def resolve_model(path: str) -> Path:
    """The Hugging Face folder behind a path, a name of `NAMED_MODELS`, or a hub id such as meta-llama/Llama-3.1-8B.

    Raises:
        InputError: no such folder, name or model, or the folder lacks its config, its weights or its tokenizer.
    """
    if path in NAMED_MODELS:
        return NAMED_MODELS[path]()
    folder = Path(path).expanduser()
    if not folder.exists() and hub.could_be_id(path):
        folder = hub.fetch(path)
    if not folder.is_dir():
        if "/" not in path:
            remedy = f"{nearest(path, NAMED_MODELS)} Or give the path of a Hugging Face model folder."
            raise InputError(path, "there is no model and no folder of that name", remedy)
        remedy = "Give the path of an existing one."
        if folder.name == "promoted":  # what a stage leaves at its end
            stage = folder.parent.name
            remedy = (
                f"Run the stage that leaves it first (`tulu fit --config configs/{stage}.yaml` fills runs/{stage}), "
                "or give another start checkpoint (--model.init_args.backbone.path)."
            )
        raise InputError(path, "there is no such model folder", remedy)
    _check_folder(folder)
    return folder


def _check_folder(folder: Path) -> None:
    remedy = "Save the model there with save_pretrained(), as safetensors, together with its tokenizer."
    if not (folder / "config.json").is_file():
        raise InputError(str(folder), "the model folder has no config.json", remedy)
    if not any(folder.glob("*.safetensors")):
        raise InputError(str(folder), "the model folder has no weights (*.safetensors)", remedy)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(str(folder), f"the model folder has no tokenizer ({' or '.join(TOKENIZER_FILES)})", remedy)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or named model.

    Raises:
        InputError: what `resolve_model` finds, a tokenizer that does not load, or one without an end-of-sequence token
            (answers would never learn to end).
    """
    folder = resolve_model(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(str(folder), f"its tokenizer does not load ({reason})", "Save the tokenizer again.") from error
    if tokenizer.eos_token_id is None:
        raise InputError(str(folder), "its tokenizer has no EOS token", "Set eos_token in its tokenizer_config.json.")
    return tokenizer


def generation_eos(path: str) -> tuple[int, ...]:
    """Token ids on which a model folder's generation stops: `eos_token_id` of its generation config.

    That is in generation_config.json, or in config.json where there is no such file. Instruct models often name more
    tokens there than the tokenizer's one EOS; Llama 3.1 has three.

    Raises:
        InputError: what `resolve_model` finds, a file that is not JSON, or an `eos_token_id` that is not made of ids.
    """
    folder = resolve_model(path)
    file = folder / "generation_config.json"
    if not file.is_file():
        file = folder / "config.json"
    remedy = "Correct it: eos_token_id is a token id or a list of them."
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
        found = config.get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(str(file), f"it cannot be read ({error})", remedy) from error
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(item) is int and item >= 0 for item in ids):
        raise InputError(str(file), f"eos_token_id is {found!r}", remedy)
    return tuple(sorted(set(ids)))
