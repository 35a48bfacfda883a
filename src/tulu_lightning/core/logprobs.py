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
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tulu_lightning.core.gradients import room_for
from tulu_lightning.core.matmul import product

__all__ = ["RowSlopes", "TileMath", "TokenStats", "token_logprobs"]

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


class RowSlopes(NamedTuple):
    """What backward knows of each row. All are fp32 and contiguous."""

    lse_N: Tensor
    """Log of the sum over the whole vocabulary."""
    up_N: Tensor
    """The gradient of the row's log-prob."""
    entropy_N: Tensor | None
    """The row's, if its gradient counts."""
    more_N: Tensor | None
    """The gradient of that."""


class TileMath(Protocol):
    """What is done to a tile of logits z / temperature, [N, K] fp32 or bf16; inside it is fp32."""

    def fold_(self, logits_NK: Tensor, by: float, maximum_N: Tensor, sum_N: Tensor, moment_N: Tensor | None) -> None:
        """Take a tile into the running sums of e^(z - maximum), and of z - maximum weighted by that; it is used up.

        Args:
            logits_NK: the tile.
            by: what its numbers are multiplied by first.
            maximum_N: fp32, the largest z so far; like the sums, changed in place.
            sum_N: fp32.
            moment_N: fp32, if it is wanted.
        """
        ...

    def slope_(self, logits_NK: Tensor, by: float, place_N: Tensor, rows: RowSlopes) -> None:
        """Make a tile its gradient: by · (up · onehot(target) - p (up + more (log p + entropy))), rounded once.

        Args:
            logits_NK: the tile.
            by: as above.
            place_N: int64, the target's column, or -1 where it is not in this tile.
            rows: what is known of the rows.
        """
        ...


class _InOperators:
    """By PyTorch's operators, on any device."""

    def __init__(self) -> None:
        self.room: Tensor | None = None

    def _wide(self, logits_NK: Tensor) -> Tensor:
        """The tile itself, or an fp32 copy of it, in a room that is kept: fresh memory costs more than the copying."""
        if logits_NK.dtype != torch.bfloat16:
            return logits_NK
        if self.room is None or len(self.room) < logits_NK.numel():
            self.room = torch.empty(logits_NK.numel(), dtype=torch.float32, device=logits_NK.device)
        return self.room[: logits_NK.numel()].view(logits_NK.shape).copy_(logits_NK)

    def fold_(self, logits_NK: Tensor, by: float, maximum_N: Tensor, sum_N: Tensor, moment_N: Tensor | None) -> None:
        z_NK = self._wide(logits_NK)
        if by != 1:
            z_NK.mul_(by)
        higher_N = torch.maximum(maximum_N, z_NK.amax(-1))
        shift_N = maximum_N - higher_N
        maximum_N.copy_(higher_N)
        z_NK.sub_(maximum_N[:, None])
        if moment_N is None:
            sum_N.mul_(shift_N.exp()).add_(z_NK.exp_().sum(-1))
            return
        p_NK = z_NK.exp()  # the sums of z - maximum are taken along when the maximum moves
        moment_N.copy_(shift_N.exp() * (moment_N + shift_N * sum_N) + z_NK.mul_(p_NK).sum(-1))
        sum_N.mul_(shift_N.exp()).add_(p_NK.sum(-1))

    def slope_(self, logits_NK: Tensor, by: float, place_N: Tensor, rows: RowSlopes) -> None:
        z_NK = self._wide(logits_NK)
        if by != 1:
            z_NK.mul_(by)
        z_NK.sub_(rows.lse_N[:, None])  # log p
        up_N = rows.up_N
        if rows.entropy_N is not None and rows.more_N is not None:
            factor_NK = z_NK.add(rows.entropy_N[:, None]).mul_(rows.more_N[:, None]).add_(up_N[:, None])
            z_NK.exp_().mul_(factor_NK.mul_(-by))
        else:
            z_NK.exp_().mul_(up_N[:, None] * -by)
        own_N = torch.where(place_N >= 0, up_N, 0.0) * by
        z_NK.scatter_add_(1, place_N.clamp(min=0)[:, None], own_N[:, None])
        if z_NK is not logits_NK:
            logits_NK.copy_(z_NK)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        target_N: Tensor,
        by: float,
        tile: int,
        entropy: bool,
        maths: TileMath,
    ) -> tuple[Tensor, Tensor]:
        work = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        maximum_N = torch.full(target_N.shape, LEAST, dtype=work, device=hidden_ND.device)
        sum_N, moment_N, logit_N = (torch.zeros_like(maximum_N) for _ in range(3))
        for part, _, logits_NK in _tiles(hidden_ND, head_VD, tile):
            place_N = _place(target_N, part)
            own_N = logits_NK.gather(1, place_N.clamp(min=0)[:, None])[:, 0].to(work) * by
            logit_N = torch.where(place_N >= 0, own_N, logit_N)
            maths.fold_(logits_NK, by, maximum_N, sum_N, moment_N if entropy else None)
        lse_N = maximum_N + sum_N.log()
        entropy_N = sum_N.log() - moment_N / sum_N if entropy else lse_N.new_empty(0)
        ctx.save_for_backward(hidden_ND, head_VD, target_N, lse_N, entropy_N)
        ctx.by, ctx.tile, ctx.entropy, ctx.maths = by, tile, entropy, maths
        if not entropy:
            ctx.mark_non_differentiable(entropy_N)
        return logit_N - lse_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        up_N, more_N = grad_outputs
        hidden_ND, head_VD, target_N, lse_N, entropy_N = ctx.saved_tensors
        # Entropies asked for as numbers only: no work for their gradient. Not kept: a second backward may want one.
        entropy = ctx.entropy and bool(more_N.any())
        live_N = (up_N != 0) | (more_N != 0) if entropy else up_N != 0
        rows = slice(None) if bool(live_N.all()) else live_N.nonzero()[:, 0]  # not those of clipped tokens and fillers
        of_entropy = (entropy_N[rows], more_N[rows].contiguous()) if entropy else (None, None)
        slopes = RowSlopes(lse_N[rows], up_N[rows].contiguous(), *of_entropy)
        grad_hidden, grad_head = _backward(ctx, hidden_ND[rows], head_VD, target_N[rows], slopes)
        if grad_hidden is not None and not isinstance(rows, slice):
            grad_hidden = torch.zeros_like(hidden_ND).index_copy_(0, rows, grad_hidden)
        return grad_hidden, grad_head, None, None, None, None, None


def _backward(
    ctx: Any, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, slopes: RowSlopes
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden states and head, where they are needed."""
    need_hidden, need_head = ctx.needs_input_grad[:2]
    # fp32: tiles are summed, and a bf16 running sum would lose small ones.
    grad_ND = torch.zeros_like(hidden_ND, dtype=slopes.lse_N.dtype) if need_hidden else None
    room_VD = room_for(head_VD) if need_head else None
    grad_VD = torch.zeros_like(head_VD) if need_head and room_VD is None else room_VD
    for part, weight_KD, logits_NK in _tiles(hidden_ND, head_VD, ctx.tile) if len(hidden_ND) else ():
        ctx.maths.slope_(logits_NK, ctx.by, _place(target_N, part), slopes)
        if grad_ND is not None:
            grad_ND += product(logits_NK, weight_KD.T)
        if grad_VD is not None:
            grad_VD[part] += product(logits_NK.T, hidden_ND.T)
    return None if grad_ND is None else grad_ND.to(hidden_ND.dtype), None if room_VD is not None else grad_VD


def _tiles(hidden_ND: Tensor, head_VD: Tensor, tile_bytes: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each run of the vocabulary: where it is, its rows of the head, and their logits, which may be written over.

    The product runs in the dtype of the hidden states.
    """
    rows, vocabulary = hidden_ND.shape[0], head_VD.shape[0]
    width = min(vocabulary, max(128, tile_bytes // (4 * max(rows, 1)) // 128 * 128))
    room = torch.empty(rows * width, dtype=hidden_ND.dtype, device=hidden_ND.device)
    for start in range(0, vocabulary, width):
        part = slice(start, min(start + width, vocabulary))
        weight_KD = head_VD[part].to(hidden_ND.dtype)
        yield part, weight_KD, product(hidden_ND, weight_KD, room[: rows * len(weight_KD)].view(rows, len(weight_KD)))


def _place(target_N: Tensor, part: slice) -> Tensor:
    """Where targets lie in a tile; -1 for those that do not."""
    return torch.where((target_N >= part.start) & (target_N < part.stop), target_N - part.start, -1)


def token_logprobs(
    hidden_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    tile_bytes: int | None = None,
    maths: TileMath | None = None,
) -> TokenStats:
    """Log-prob of each target under `softmax(hidden @ head.T / temperature)`, never holding all logits.

    Args:
        hidden_ND: hidden states that predict the targets, fp32 or bf16; their dtype is that of the matrix product.
        head_VD: output embedding.
        target_N: int64 token ids.
        temperature: what logits are divided by; the sampler's own, so that both sides speak of one policy.
        entropy: also return the entropy at each place (differentiable, too).
        tile_bytes: fp32 logits alive at once, about; `TILE_BYTES` of the device if left out.
        maths: what is done to a tile; PyTorch's operators if left out.

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
        made: Any = _TokenLogprobs.apply(
            hidden_ND, head_VD, target_N, 1 / temperature, tile, entropy, maths or _InOperators()
        )
        logp_N, entropy_N = made
    return TokenStats(logp_N, entropy_N if entropy else None)
