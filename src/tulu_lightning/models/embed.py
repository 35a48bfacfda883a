"""Texts as vectors: the mean of a causal LM's last hidden states over a text's tokens.

For `decontaminate.mode: embedding`, which asks for it by its import path.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from tulu_lightning.assets.models import load_tokenizer, resolve_model
from tulu_lightning.core.packing import pack
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.types import Document, Segment

__all__ = ["embed_texts"]

PASS = 4096
"""Tokens of one pass, and at least one text."""


def embed_texts(texts: Sequence[str], model: str, max_tokens: int) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """One vector a text; that of a text without tokens is zero.

    Args:
        texts: any.
        model: folder of a causal LM, or a known name.
        max_tokens: of a text, its first ones.

    Returns:
        [texts, D], float32, of any length.

    Raises:
        InputError: there is no such model, or it does not load.
    """
    lm, tokenizer = _loaded(str(resolve_model(model)))
    device = next(lm.parameters()).device
    made = torch.zeros(len(texts), int(lm.lm.config.get_text_config().hidden_size))
    encoded: Any = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    ids = [torch.tensor(one[:max_tokens], dtype=torch.int64) for one in encoded]
    # Of one length together, so that a pass is neither many tokens nor few.
    for places in _passes([len(one) for one in ids]):
        documents = [Document((Segment(ids[at], torch.zeros(len(ids[at]))),)) for at in places]
        made[places] = _means(lm, documents, device)
    return made.numpy()


@lru_cache(maxsize=1)
def _loaded(folder: str) -> tuple[PackedLM, Any]:
    lm = PackedLM(Backbone(folder), folder).eval()
    return lm.to("cuda" if torch.cuda.is_available() else "cpu"), load_tokenizer(folder)


def _passes(lengths: Sequence[int]) -> list[list[int]]:
    passes: list[list[int]] = []
    room = 0
    for at in sorted((at for at, length in enumerate(lengths) if length), key=lambda at: (lengths[at], at)):
        if not passes or lengths[at] > room:
            passes.append([])
            room = PASS
        passes[-1].append(at)
        room -= lengths[at]
    return passes


@torch.inference_mode()
def _means(lm: PackedLM, documents: Sequence[Document], device: torch.device) -> torch.Tensor:
    packed = pack(documents)
    packed = packed._replace(tokens_T=packed.tokens_T.to(device), positions_T=packed.positions_T.to(device))
    every = torch.arange(len(packed.tokens_T), device=device)
    hidden_TD = lm.hidden_at(lm.lm.get_decoder(), packed, every).float()  # type: ignore[arg-type]
    return torch.stack([hidden_TD[span.start : span.end].mean(0) for span in packed.spans]).cpu()
