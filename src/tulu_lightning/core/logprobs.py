"""The one number per token that everything else is made of: log p(target), without the logits of a batch.

Hidden states meet the output head one run of the vocabulary (a tile) at a time; each tile's logits are folded into a
running log-sum-exp (and entropy, on demand) and overwritten by the next. Backward computes them again, tile by tile,
so any upstream gradient per token will do: DPO sums it, PPO multiplies it by a ratio. Peak extra memory is that of a
tile instead of `N x V`, and every tile writes its own rows of the head's gradient once, so nothing of the head's size
is summed over.

SFT knows the upstream gradient beforehand and has a cheaper way: `core.nll`.

Source of the arithmetic: for logits z / temperature, log p(t) = z_t - logsumexp(z), d log p(t) / dz = onehot(t) - p,
entropy H = logsumexp(z) - sum p z, dH/dz = -p (log p + H).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tulu_lightning.core.gradients import room_for
from tulu_lightning.core.matmul import product

__all__ = ["TokenStats", "token_logprobs"]

TILE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
"""fp32 logits alive at once: on CPU what a cache holds (each tile is read several times), else what fills the device."""
LEAST = -1e30
"""Start of a running maximum: finite, so that its difference to the first real one is, too."""


class TokenStats(NamedTuple):
    """What is known of each scored token."""

    logp_N: Tensor
    """float32, log-prob of the target at the given temperature, in nats."""
    entropy_N: Tensor | None
    """float32, entropy of the whole distribution there, in nats; None unless asked for."""
    nll: Tensor | None = None
    """float32 scalar, sum of weight · -log p; None unless weights were given, and then it alone has a gradient."""


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, temperature: float, tile: int, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        maximum_N = torch.full(target_N.shape, LEAST, dtype=torch.float32, device=hidden_ND.device)
        sum_N, moment_N, logit_N = (torch.zeros_like(maximum_N) for _ in range(3))
        for part, _, logits_NK, _ in _tiles(hidden_ND, head_VD, temperature, tile):
            inside_N, place_N1 = _place(target_N, part)
            logit_N = torch.where(inside_N, logits_NK.gather(1, place_N1)[:, 0], logit_N)
            higher_N = torch.maximum(maximum_N, logits_NK.amax(-1))
            shift_N, maximum_N = maximum_N - higher_N, higher_N
            logits_NK.sub_(maximum_N[:, None])
            if entropy:  # of z - maximum, whose sums are taken along when the maximum moves
                p_NK = logits_NK.exp()
                moment_N = shift_N.exp() * (moment_N + shift_N * sum_N) + logits_NK.mul_(p_NK).sum(-1)
                sum_N = shift_N.exp() * sum_N + p_NK.sum(-1)
            else:
                sum_N = shift_N.exp() * sum_N + logits_NK.exp_().sum(-1)
        lse_N = maximum_N + sum_N.log()
        entropy_N = sum_N.log() - moment_N / sum_N if entropy else lse_N.new_empty(0)
        ctx.save_for_backward(hidden_ND, head_VD, target_N, lse_N, entropy_N)
        ctx.temperature, ctx.tile, ctx.entropy = temperature, tile, entropy
        if not entropy:
            ctx.mark_non_differentiable(entropy_N)
        return logit_N - lse_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        up_N, up_entropy_N = grad_outputs
        hidden_ND, head_VD, target_N, lse_N, entropy_N = ctx.saved_tensors
        ctx.entropy = ctx.entropy and bool(up_entropy_N.any())  # asked for as a number only: no work for its gradient
        live_N = (up_N != 0) | (up_entropy_N != 0) if ctx.entropy else up_N != 0
        grad_hidden, grad_head = None, None
        if bool(live_N.all()):
            grad_hidden, grad_head = _backward(ctx, hidden_ND, head_VD, target_N, lse_N, entropy_N, up_N, up_entropy_N)
        else:  # clipped tokens of PPO, fillers: their rows are not computed
            rows = live_N.nonzero()[:, 0]
            of_entropy = (x[rows] if ctx.entropy else x for x in (entropy_N, up_entropy_N))
            own_entropy_N, own_up_entropy_N = of_entropy
            part, grad_head = _backward(
                ctx, hidden_ND[rows], head_VD, target_N[rows], lse_N[rows], own_entropy_N, up_N[rows], own_up_entropy_N
            )
            if part is not None:
                grad_hidden = torch.zeros_like(hidden_ND).index_copy_(0, rows, part)
        return grad_hidden, grad_head, None, None, None, None


def _backward(
    ctx: Any,
    hidden_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    lse_N: Tensor,
    entropy_N: Tensor,
    up_N: Tensor,
    up_entropy_N: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden states and head, where they are needed."""
    need_hidden, need_head = ctx.needs_input_grad[:2]
    # fp32: tiles are summed, and a bf16 running sum would lose small ones.
    grad_ND = torch.zeros_like(hidden_ND, dtype=torch.float32) if need_hidden else None
    room_VD = room_for(head_VD) if need_head else None
    grad_VD = torch.zeros_like(head_VD) if need_head and room_VD is None else room_VD
    tiles = _tiles(hidden_ND, head_VD, ctx.temperature, ctx.tile) if len(hidden_ND) else ()
    for part, weight_KD, logits_NK, product_NK in tiles:
        logits_NK.sub_(lse_N[:, None])  # log p
        if ctx.entropy:
            slope_NK = logits_NK.add(entropy_N[:, None]).mul_(up_entropy_N[:, None]).add_(up_N[:, None])
            logits_NK.exp_().mul_(slope_NK.neg_())
        else:
            logits_NK.exp_().mul_(-up_N[:, None])
        inside_N, place_N1 = _place(target_N, part)
        logits_NK.scatter_add_(1, place_N1, torch.where(inside_N, up_N, 0.0)[:, None])
        if ctx.temperature != 1:
            logits_NK.div_(ctx.temperature)
        product_NK.copy_(logits_NK)
        if grad_ND is not None:
            grad_ND += product(product_NK, weight_KD.T)
        if grad_VD is not None:
            grad_VD[part] += product(product_NK.T, hidden_ND.T)
    return None if grad_ND is None else grad_ND.to(hidden_ND.dtype), None if room_VD is not None else grad_VD


def _tiles(
    hidden_ND: Tensor, head_VD: Tensor, temperature: float, tile_bytes: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """For each run of the vocabulary: where it is, its rows of the head, its fp32 logits, and these as multiplied.

    The product runs in the dtype of the hidden states, everything after it in fp32; in fp32 the last two are one.
    """
    rows, vocabulary = hidden_ND.shape[0], head_VD.shape[0]
    width = min(vocabulary, max(128, tile_bytes // (4 * max(rows, 1)) // 128 * 128))
    room = torch.empty(rows * width, dtype=hidden_ND.dtype, device=hidden_ND.device)
    wide = None if room.dtype == torch.float32 else room.float()
    for start in range(0, vocabulary, width):
        part = slice(start, min(start + width, vocabulary))
        weight_KD = head_VD[part].to(hidden_ND.dtype)
        size = rows * len(weight_KD)
        product_NK = product(hidden_ND, weight_KD, room[:size].view(rows, len(weight_KD)))
        logits_NK = product_NK if wide is None else wide[:size].view(rows, len(weight_KD)).copy_(product_NK)
        yield part, weight_KD, logits_NK if temperature == 1 else logits_NK.div_(temperature), product_NK


def _place(target_N: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in a tile, and where; somewhere in it for the others."""
    place_N = target_N - part.start
    inside_N = (place_N >= 0) & (target_N < part.stop)
    return inside_N, place_N.clamp(0, part.stop - part.start - 1)[:, None]


def token_logprobs(
    hidden_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    tile_bytes: int | None = None,
) -> TokenStats:
    """Log-prob of each target under `softmax(hidden @ head.T / temperature)`, never holding all logits.

    Args:
        hidden_ND: hidden states that predict the targets, fp32 or bf16; their dtype is that of the matrix product.
        head_VD: output embedding.
        target_N: int64 token ids.
        temperature: what logits are divided by; the sampler's own, so that both sides speak of one policy.
        entropy: also return the entropy at each place (differentiable, too).
        tile_bytes: fp32 logits alive at once, about; `TILE_BYTES` of the device if left out.

    Returns:
        float32 log-probs in nats (and entropies). Gradients flow to `hidden_ND` and `head_VD`; tokens whose upstream
        gradient is 0 cost no backward.

    Raises:
        ValueError: a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; log-probs need one above 0")
    tile = tile_bytes or TILE_BYTES.get(hidden_ND.device.type, TILE_BYTES["cuda"])
    with torch.autocast(hidden_ND.device.type, enabled=False):  # dtypes here are chosen by hand
        logp_N, entropy_N = _TokenLogprobs.apply(hidden_ND, head_VD, target_N, temperature, tile, entropy)  # type: ignore[misc]
    return TokenStats(logp_N, entropy_N if entropy else None)
