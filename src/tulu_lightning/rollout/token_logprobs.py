"""Log-probs of given tokens under an engine's weights: both ways that it computes."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tulu_lightning.rollout.llama import Causal, LlamaLM

__all__ = ["Pair", "by_forward", "by_llama"]

Pair = tuple[Sequence[int], Sequence[int]]
"""Prompt and response."""

TOKENS = 4096
"""Tokens computed together at most; a longer sequence alone."""
LOGIT_ROWS = 256
"""Rows of logits that are alive together."""


def by_llama(lm: LlamaLM, sequences: Sequence[Pair], temperature: float) -> list[Tensor]:
    """By the forward pass that decoding uses; arguments and result as `Engine.logprobs`."""
    found: list[Tensor] = []
    for part in _parts(sequences):
        whole = [[*prompt, *response] for prompt, response in part]
        causal = Causal(lm, [len(ids) for ids in whole])
        ids_T = torch.tensor([token for ids in whole for token in ids], device=lm.device)
        positions_T = torch.cat([torch.arange(len(ids), device=lm.device) for ids in whole])
        hidden_TD = lm.hidden(ids_T, positions_T, causal)
        for (prompt, _), (start, end) in zip(part, causal.bounds, strict=True):
            first = start + len(prompt)
            before = hidden_TD[first - 1 : end - 1].split(LOGIT_ROWS)
            scores = [
                _gather(lm.logits(rows), ids, temperature)
                for rows, ids in zip(before, ids_T[first:end].split(LOGIT_ROWS), strict=True)
            ]
            found.append(torch.cat(scores).cpu())
    return found


def by_forward(model: PreTrainedModel, sequences: Sequence[Pair], temperature: float) -> list[Tensor]:
    """By the model's own forward, sequence by sequence; arguments and result as `Engine.logprobs`."""
    found = []
    for prompt, response in sequences:
        ids = torch.tensor([[*prompt, *response]], device=model.device)
        logits_LV = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        found.append(_gather(logits_LV, ids[0, len(prompt) :], temperature).cpu())
    return found


def _parts(sequences: Sequence[Pair]) -> Iterator[list[Pair]]:
    part, tokens = list[Pair](), 0
    for pair in sequences:
        length = len(pair[0]) + len(pair[1])
        if part and tokens + length > TOKENS:
            yield part
            part, tokens = [], 0
        part.append(pair)
        tokens += length
    if part:
        yield part


def _gather(logits_LV: Tensor, ids_L: Tensor, temperature: float) -> Tensor:
    logp_LV = torch.log_softmax(logits_LV.float() / temperature, -1)
    return logp_LV.gather(1, ids_L[:, None])[:, 0]
