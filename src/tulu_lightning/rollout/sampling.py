"""From logits to tokens: one uniform number a row and step, so that a row's luck is its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tulu_lightning.core.step_plan import mix_seed

__all__ = ["filtered", "pick", "uniforms"]


def uniforms(seed: int, rows: Sequence[tuple[int, int]], steps: int) -> Tensor:
    """The uniform numbers of each row, drawn from a generator seeded by (seed, prompt key, sample index).

    Returns:
        float32 `[R, steps]` in [0, 1), on the host: the same on every device.
    """
    generator = torch.Generator()
    uniform_RL = torch.empty(len(rows), steps)
    for row, (key, sample) in zip(uniform_RL, rows, strict=True):
        torch.rand(steps, generator=generator.manual_seed(mix_seed(seed, key, sample)), out=row)
    return uniform_RL


def pick(
    logits_RV: Tensor, temperature: float, uniform_R: Tensor, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """One token of each row from softmax(logits / temperature), by inverting the cumulative distribution.

    This needs one number a row instead of one a vocabulary entry, and is about ten times as fast on a CPU as
    `torch.multinomial`. Mass is summed by blocks of the vocabulary first, then only the block that is hit is searched.

    Args:
        logits_RV: any floating dtype; the arithmetic is fp32.
        temperature: 0 takes the most likely token.
        uniform_R: float32 in [0, 1).
        top_p: see `filtered`; not used at temperature 0.
        top_k: likewise.

    Returns:
        int64 tokens and their float32 log-probs under the distribution that was sampled from, with its temperature and
        its filters; for temperature 0 under softmax(logits).
    """
    if temperature == 0:
        p_RV = torch.softmax(logits_RV, -1, dtype=torch.float32)
        token_R = logits_RV.argmax(-1)
    else:
        if temperature != 1:
            logits_RV = logits_RV.float() / temperature
        if top_k or top_p < 1:
            logits_RV = filtered(logits_RV, top_p, top_k)
        p_RV = torch.softmax(logits_RV, -1, dtype=torch.float32)
        token_R = _invert(p_RV, uniform_R)
    return token_R, p_RV.gather(1, token_R[:, None])[:, 0].log()


def filtered(logits_RV: Tensor, top_p: float, top_k: int) -> Tensor:
    """Logits with -inf where a token is left out, as vLLM and transformers do it: first top-k, then top-p of the rest.

    Args:
        logits_RV: already divided by the temperature.
        top_p: keeps each token before which, in order of probability, less than this mass lies; the first one always.
        top_k: keeps so many tokens, and all that tie with the last of them; 0 keeps all.
    """
    logits_RV = logits_RV.float()
    if 0 < top_k < logits_RV.shape[1]:
        least_R1 = logits_RV.topk(top_k).values[:, -1:]
        logits_RV = logits_RV.masked_fill(logits_RV < least_R1, -torch.inf)
    if top_p < 1:
        order_RV = torch.argsort(logits_RV, dim=-1, descending=True, stable=True)
        p_RV = torch.softmax(logits_RV, -1).gather(1, order_RV)
        out_RV = p_RV.cumsum(-1).sub_(p_RV) >= top_p
        out_RV[:, 0] = False
        logits_RV = logits_RV.masked_fill(out_RV.scatter(1, order_RV, out_RV), -torch.inf)
    return logits_RV


BLOCK = 256
"""Entries of the vocabulary that are summed together."""


def _invert(p_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The first token up to which there is more than `uniform` of the mass; one that has a probability above 0."""
    vocabulary = p_RV.shape[1]
    whole = vocabulary // BLOCK * BLOCK
    sums = p_RV[:, :whole].view(len(p_RV), -1, BLOCK).sum(-1)
    if whole < vocabulary:
        sums = torch.cat([sums, p_RV[:, whole:].sum(-1, keepdim=True)], 1)
    mass, total_R1 = _mass(sums)
    level_R1 = torch.minimum(uniform_R[:, None] * total_R1, _below(total_R1))
    block_R1 = torch.searchsorted(mass, level_R1, right=True).clamp_(max=mass.shape[1] - 1)
    before_R1 = torch.where(block_R1 > 0, mass.gather(1, (block_R1 - 1).clamp_(min=0)), 0.0)
    place = block_R1 * BLOCK + torch.arange(BLOCK, device=p_RV.device)
    p_RB = p_RV.gather(1, place.clamp(max=vocabulary - 1)).masked_fill_(place >= vocabulary, 0.0)
    mass, total_R1 = _mass(p_RB)
    # The two sums over a block are rounded apart: what is left to go may be outside of [0, total).
    level_R1 = torch.minimum((level_R1 - before_R1).clamp_(min=0), _below(total_R1))
    inside_R1 = torch.searchsorted(mass, level_R1, right=True).clamp_(max=BLOCK - 1)
    return (block_R1 * BLOCK + inside_R1).clamp_(max=vocabulary - 1)[:, 0]


def _mass(p: Tensor) -> tuple[Tensor, Tensor]:
    mass = p.cumsum(-1)
    return mass, mass[:, -1:]


def _below(total: Tensor) -> Tensor:
    """The next smaller number: there is a first place with more mass than that, and its probability is above 0."""
    return torch.nextafter(total, torch.zeros_like(total))
