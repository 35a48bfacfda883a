"""Log-probs of given tokens under an engine's weights: both ways that it computes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tulu_lightning.core.prefix_tree import Pair, prefix_pack, prefix_parts
from tulu_lightning.models.backends import Attend as Tiles
from tulu_lightning.models.backends import trial
from tulu_lightning.models.compiled import DTYPES
from tulu_lightning.models.matmul import MatmulTiles
from tulu_lightning.models.segments import CompiledSegments
from tulu_lightning.models.tiles import SdpaTiles
from tulu_lightning.rollout.llama import Attend, LlamaLM
from tulu_lightning.types import Span

__all__ = ["by_forward", "by_llama"]

TOKENS = 4096
"""Tokens computed together, about; a longer sequence alone."""
LOGIT_ROWS = 256
"""Rows of logits that are alive together."""


def by_llama(lm: LlamaLM, sequences: Sequence[Pair], temperature: float) -> list[Tensor]:
    """By the forward pass that decoding uses; arguments and result as `Engine.logprobs`.

    What sequences begin with is computed once for all of a pass: a question for its choices, examples for their questions.
    """
    found: dict[int, Tensor] = {}
    for part in prefix_parts(sequences, TOKENS):
        pairs = [sequences[i] for i in part]
        made = prefix_pack(pairs)
        ids_T, positions_T = made.tokens_T.to(lm.device), made.positions_T.to(lm.device)
        hidden_TD = lm.hidden(ids_T, positions_T, _attend(lm, made.spans))
        scores = [
            _gather(lm.logits(hidden_TD[rows]), ids, temperature).cpu()
            for rows, ids in zip(
                made.source_N.to(lm.device).split(LOGIT_ROWS),
                made.target_N.to(lm.device).split(LOGIT_ROWS),
                strict=True,
            )
        ]
        lengths = [len(response) for _, response in pairs]
        found.update(zip(part, torch.cat(scores).split(lengths), strict=True))
    return [found[i] for i in range(len(sequences))]


def _attend(lm: LlamaLM, spans: Sequence[Span]) -> Attend:
    """Attention over segments for the engine's forward."""
    tiles: Tiles
    if lm.device.type != "cpu":
        tiles = SdpaTiles(spans, lm.device)
    elif lm.compiled is not None and lm.dtype in DTYPES and _works(lm):
        tiles = CompiledSegments(spans, lm.device)
    else:
        tiles = MatmulTiles(spans, lm.device)

    def attend(layer: int, qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in qkv.split([lm.heads, lm.key_heads, lm.key_heads], 1))
        return tiles(q, k, v, 1.0)[0].flatten(1)

    return attend


def _works(lm: LlamaLM) -> bool:
    """Whether compiled attention is there and right; tried once a shape."""
    return trial("compiled", True, lm.device, lm.dtype, lm.model.config) is None


def by_forward(model: PreTrainedModel, sequences: Sequence[Pair], temperature: float) -> list[Tensor]:
    """By the model's own forward, sequence by sequence; arguments and result as `Engine.logprobs`."""
    found: list[Tensor] = []
    before: tuple[int, ...] = ()
    logits_TV = torch.empty(0)
    for prompt, response in sequences:
        read = (*prompt, *response[:-1])
        if read != before:  # answers of one token to one prompt stand side by side
            ids = torch.tensor([read], device=model.device)
            logits_TV, before = model(input_ids=ids, use_cache=False).logits[0], read
        ids_L = torch.tensor(response, device=model.device)
        found.append(_gather(logits_TV[len(prompt) - 1 :], ids_L, temperature).cpu())
    return found


def _gather(logits_LV: Tensor, ids_L: Tensor, temperature: float) -> Tensor:
    logp_LV = torch.log_softmax(logits_LV.float() / temperature, -1)
    return logp_LV.gather(1, ids_L[:, None])[:, 0]
