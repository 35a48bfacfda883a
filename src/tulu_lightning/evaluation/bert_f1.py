"""BERTScore's F1 (Zhang et al. 2020, section 3): how well the tokens of two texts pair up by their contextual embeddings.

Plain, as HREF has it: RoBERTa-large's 17th layer, no weights by rarity, no rescaling.
"""

import threading
from typing import Any

import torch
from torch.nn.functional import normalize

from tulu_lightning.errors import InputError

__all__ = ["LAYER", "BertF1"]

LAYER = 17
"""Of RoBERTa-large: the layer that agrees best with people (the authors' package)."""
MARKS = 2
"""Tokens around each text."""


class BertF1:
    """Scores pairs of texts; the model is loaded when it is first asked, and stays behind when this is sent elsewhere.

    Args:
        layer: whose output is compared; 1 is the first.
    """

    def __init__(self, layer: int = LAYER) -> None:
        self.layer = layer
        self._lock = threading.Lock()
        self._loaded: dict[str, tuple[Any, Any]] = {}

    def __reduce__(self) -> tuple[type["BertF1"], tuple[int]]:
        return BertF1, (self.layer,)

    def check(self, path: str) -> None:
        """Refuse a model that cannot serve.

        Raises:
            InputError: there is no such folder, or it has too few layers.
        """
        from transformers import AutoConfig

        from tulu_lightning.assets.models import resolve_model

        folder = resolve_model(path)
        layers = AutoConfig.from_pretrained(folder, trust_remote_code=False).num_hidden_layers
        if layers < self.layer:
            raise InputError(
                str(folder), f"has {layers} layers, and layer {self.layer} is compared", "Use RoBERTa-large."
            )

    @torch.no_grad()
    def __call__(self, path: str, text: str, reference: str) -> float:
        """F1 of two texts; 0 if one of them has no tokens. Each is cut to what the model takes in."""
        with self._lock:
            if path not in self._loaded:
                self._loaded[path] = self._load(path)
            model, tokenizer = self._loaded[path]
            text_LD, reference_MD = (self._embedded(model, tokenizer, each) for each in (text, reference))
        if min(len(text_LD), len(reference_MD)) <= MARKS:
            return 0.0
        # As in the authors' package, a token may pair up with the mark that begins or ends the other text; the marks
        # themselves do not count.
        cosine_LM = text_LD @ reference_MD.T
        precision, recall = cosine_LM[1:-1].max(1).values.mean(), cosine_LM[:, 1:-1].max(0).values.mean()
        return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0

    def _load(self, path: str) -> tuple[Any, Any]:
        from transformers import AutoModel

        from tulu_lightning.assets.models import load_tokenizer, resolve_model

        folder = resolve_model(path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = AutoModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        return model.eval().to(device), load_tokenizer(path)

    def _embedded(self, model: Any, tokenizer: Any, text: str) -> torch.Tensor:
        """[tokens, features], each of norm 1."""
        # A space in front: the first word is then the same token as inside a text, as the authors' package has it.
        longest = min(tokenizer.model_max_length, model.config.max_position_embeddings)
        words = f" {text.strip()}" if text.strip() else ""
        made = tokenizer(words, truncation=True, max_length=longest, return_tensors="pt").to(model.device)
        hidden_TD = model(**made, output_hidden_states=True).hidden_states[self.layer][0]
        return normalize(hidden_TD.float(), dim=-1).cpu()
