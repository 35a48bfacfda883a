"""The one number per token that everything else is made of: log p(target), without the logits of a batch.

Hidden states meet the output head a few hundred rows at a time; each chunk's logits are reduced to a log-prob (and an
entropy, on demand) and thrown away. Backward computes them again, chunk by chunk, so any upstream gradient per token
will do: SFT weights it, DPO sums it, PPO multiplies it by a ratio. Peak extra memory is a small multiple of
`chunk x V` instead of `N x V`.

Source of the arithmetic: for logits z / temperature, log p(t) = z_t - logsumexp(z), d log p(t) / dz = onehot(t) - p,
entropy H = logsumexp(z) - sum p z, dH/dz = -p (log p + H).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["TokenStats", "token_logprobs"]

CHUNK = 512
"""Rows of logits alive at once. At V = 128k in fp32 that is 0.26 GB."""


class TokenStats(NamedTuple):
    """What is known of each scored token."""

    logp_N: Tensor
    """float32, log-prob of the target at the given temperature, in nats."""
    entropy_N: Tensor | None
    """float32, entropy of the whole distribution there, in nats; None unless asked for."""


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, target_N: Tensor, temperature: float, chunk: int, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        rows, weight_VD = hidden_ND.shape[0], head_VD.to(hidden_ND.dtype)
        logp_N = torch.empty(rows, dtype=torch.float32, device=hidden_ND.device)
        lse_N = torch.empty_like(logp_N)
        entropy_N = torch.empty_like(logp_N) if entropy else logp_N.new_empty(0)
        for at in range(0, rows, chunk):
            part = slice(at, at + chunk)
            logits_CV = _logits(hidden_ND[part], weight_VD, temperature)
            lse_N[part] = torch.logsumexp(logits_CV, -1)
            logp_N[part] = logits_CV.gather(1, target_N[part, None])[:, 0] - lse_N[part]
            if entropy:
                p_CV = torch.exp(logits_CV - lse_N[part, None])
                entropy_N[part] = lse_N[part] - (p_CV * logits_CV).sum(-1)
        ctx.save_for_backward(hidden_ND, head_VD, target_N, lse_N, entropy_N)
        ctx.temperature, ctx.chunk, ctx.entropy = temperature, chunk, entropy
        if not entropy:
            ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_logp_N, grad_entropy_N = grad_outputs
        hidden_ND, head_VD, target_N, lse_N, entropy_N = ctx.saved_tensors
        need_hidden, need_head = ctx.needs_input_grad[:2]
        weight_VD = head_VD.to(hidden_ND.dtype)
        # fp32: chunks are summed, and a bf16 running sum would lose small ones.
        grad_head = torch.zeros(head_VD.shape, dtype=torch.float32, device=head_VD.device) if need_head else None
        grad_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        for at in range(0, hidden_ND.shape[0], ctx.chunk):
            part = slice(at, at + ctx.chunk)
            log_p_CV = _logits(hidden_ND[part], weight_VD, ctx.temperature).sub_(lse_N[part, None])
            p_CV = log_p_CV.exp()
            grad_CV = p_CV * -grad_logp_N[part, None]
            grad_CV.scatter_add_(1, target_N[part, None], grad_logp_N[part, None])
            if ctx.entropy:
                grad_CV.sub_(p_CV.mul_(log_p_CV.add_(entropy_N[part, None])).mul_(grad_entropy_N[part, None]))
            grad_CV = grad_CV.div_(ctx.temperature).to(hidden_ND.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_CV @ weight_VD
            if grad_head is not None:
                grad_head += (grad_CV.T @ hidden_ND[part]).float()
        return grad_hidden, None if grad_head is None else grad_head.to(head_VD.dtype), None, None, None, None


def _logits(hidden_CD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    # The product runs in the dtype of the hidden states (the head was cast to it); everything after it in fp32.
    return (hidden_CD @ weight_VD.T).float().div_(temperature)


def token_logprobs(
    hidden_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int = CHUNK,
) -> TokenStats:
    """Log-prob of each target under `softmax(hidden @ head.T / temperature)`, never holding all logits.

    Args:
        hidden_ND: hidden states that predict the targets, fp32 or bf16; their dtype is that of the matrix product.
        head_VD: output embedding.
        target_N: int64 token ids.
        temperature: what logits are divided by; the sampler's own, so that both sides speak of one policy.
        entropy: also return the entropy at each place (differentiable, too).
        chunk: rows of logits alive at once.

    Returns:
        float32 log-probs in nats (and entropies). Gradients flow to `hidden_ND` and `head_VD`.

    Raises:
        ValueError: a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; log-probs need one above 0")
    with torch.autocast(hidden_ND.device.type, enabled=False):  # dtypes here are chosen by hand
        logp_N, entropy_N = _TokenLogprobs.apply(hidden_ND, head_VD, target_N, temperature, chunk, entropy)  # type: ignore[misc]
    return TokenStats(logp_N, entropy_N if entropy else None)
