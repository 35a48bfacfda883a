"""Models from the Hugging Face hub: fetched once, into the place where huggingface_hub keeps what it fetches (HF_HOME)."""

import re
from functools import cache
from pathlib import Path

from huggingface_hub import snapshot_download

from tulu_lightning.errors import InputError

__all__ = ["could_be_id", "fetch"]

WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
UNWANTED = ["original/*"]
"""Meta's own format, which some repositories hold beside the safetensors."""


def could_be_id(path: str) -> bool:
    """Whether a path that is no local folder can be a hub id: two names with one slash, the first not a folder here."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path)) and not Path(path).parent.exists()


@cache  # one revision for the whole run, and one question to the hub
def fetch(hub_id: str) -> Path:
    """The local folder with a hub model's safetensors, config and tokenizer; opens offline if it was fetched before.

    Raises:
        InputError: no such model, no access to it, or no hub.
    """
    try:
        return Path(snapshot_download(hub_id, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except Exception as error:  # the hub's client raises whatever it met
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        what = f"there is no such model folder, and the hub gives no model of that name ({reason})"
        remedy = (
            "Give the path of a model folder; or check the name, the network, and for a gated model that its licence "
            "is accepted and HF_TOKEN is set."
        )
        raise InputError(hub_id, what, remedy) from error
