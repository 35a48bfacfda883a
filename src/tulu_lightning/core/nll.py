"""The weighted sum of -log p(target), with its gradient made on the way: three products with the head instead of four.

`core.logprobs` has to compute the logits again in backward, since anything may happen to a log-prob in between. Where
the loss is a sum whose weights are known beforehand (SFT), a chunk of rows can be finished while its logits are there:
gradient of the logits, of the hidden states and of the head. Only the rows' sum over the whole vocabulary is needed
first, so the chunks are runs of rows here, of which some hundred are alive at once.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tulu_lightning.core.gradients import room_for
from tulu_lightning.core.matmul import product

__all__ = ["Finish", "WeightedNll", "compiled_finish", "weighted_nll"]

Finish = Callable[[Tensor, Tensor, bool], Tensor]
"""Takes logits [C, V], targets [C], and whether there is to be a gradient; returns fp32 log-probs of the targets, and
writes `p - onehot(target)`, the gradient of -log p, over the logits if so."""

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
"""Logits alive at once: each chunk passes once over the head's whole gradient, so there should be few."""
HEAD_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
"""Of the head's gradient, what is added to at a time."""
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}
"""Of the logits, what is worked on at a time in fp32: on CPU, what stays in the cache."""


class WeightedNll(NamedTuple):
    """A loss, and what it is made of."""

    loss: Tensor
    """float32 scalar: sum of weight · -log p."""
    logp_N: Tensor
    """float32, log-prob of each target in nats, without a gradient; 0 where the weight is 0."""


class _WeightedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        target_N: Tensor,
        weight_N: Tensor,
        train: bool,
        chunk: int,
        finish: Finish,
        room_VD: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        rows = weight_N.nonzero()[:, 0]
        own_ND = hidden_ND if len(rows) == len(weight_N) else hidden_ND[rows]
        need_hidden, need_head = (needed and train for needed in ctx.needs_input_grad[:2])
        grad_ND = torch.zeros_like(own_ND) if need_hidden else None
        own_VD = torch.zeros_like(head_VD, dtype=torch.float32) if need_head and room_VD is None else None
        grad_VD = own_VD if room_VD is None else room_VD
        logp_N = _run(own_ND, head_VD, target_N[rows], weight_N[rows], grad_ND, grad_VD, chunk, finish)
        if grad_ND is not None and own_ND is not hidden_ND:
            grad_ND = torch.zeros_like(hidden_ND).index_copy_(0, rows, grad_ND)
        # Not saved, but given away by backward: a gradient that nobody else holds becomes the parameter's as it is,
        # where one that is kept here would be copied, and the head's is the largest tensor of a step.
        ctx.grads = (grad_ND, None if own_VD is None else own_VD.to(head_VD.dtype))
        ctx.placed = room_VD is not None
        logp_N = torch.zeros_like(weight_N).index_copy_(0, rows, logp_N)
        ctx.mark_non_differentiable(logp_N)
        return -(weight_N * logp_N).sum(), logp_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        up, _ = grad_outputs
        if ctx.grads is None:
            raise RuntimeError("this loss was made for one backward, which has been: its gradients are given away")
        grads, ctx.grads = ctx.grads, None
        if up.device.type != "cpu" or up != 1:  # elsewhere, looking would wait for the device
            if ctx.placed:
                told = f"the head's gradient has been added already, and now it is to be multiplied by {float(up)}"
                raise RuntimeError(
                    f"{told}: put the factor into the weights, or make the loss outside of `accumulating`"
                )
            for grad in grads:
                if grad is not None:
                    grad.mul_(up.to(grad.dtype))
        return *grads, None, None, None, None, None, None


def _run(
    hidden_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    weight_N: Tensor,
    grad_ND: Tensor | None,
    grad_VD: Tensor | None,
    chunk: int,
    finish: Finish,
) -> Tensor:
    """Log-probs; adds the loss's gradients to `grad_ND` and `grad_VD` where they are given."""
    rows, vocabulary = hidden_ND.shape[0], head_VD.shape[0]
    logp_N = torch.empty(rows, dtype=torch.float32, device=hidden_ND.device)
    if not rows:
        return logp_N
    most = max(1, chunk // (hidden_ND.element_size() * vocabulary))
    count = -(-rows // -(-rows // most))  # as few chunks as will do, and these alike
    weight_VD = head_VD.to(hidden_ND.dtype)
    logits = torch.empty(count, vocabulary, dtype=hidden_ND.dtype, device=hidden_ND.device)
    width = max(1, HEAD_BYTES.get(head_VD.device.type, HEAD_BYTES["cuda"]) // (4 * head_VD.shape[1]))
    runs = [slice(at, at + width) for at in range(0, vocabulary, width)]
    gradient = grad_ND is not None or grad_VD is not None
    for start in range(0, rows, count):
        part = slice(start, min(start + count, rows))
        logits_CV = product(hidden_ND[part], weight_VD, logits[: part.stop - start])
        logp_N[part] = finish(logits_CV, target_N[part], gradient)
        if grad_ND is not None:
            grad_ND[part] = product(logits_CV, weight_VD.T) * weight_N[part, None]
        if grad_VD is not None:
            scaled_CD = (hidden_ND[part] * weight_N[part, None]).to(hidden_ND.dtype)
            for run in runs:
                grad_VD[run] += product(logits_CV[:, run].T, scaled_CD.T)
    return logp_N


def _finish(logits_CV: Tensor, target_C: Tensor, gradient: bool) -> Tensor:
    """As `Finish`, in PyTorch's operators."""
    logp_C = torch.empty(target_C.shape, dtype=torch.float32, device=logits_CV.device)
    size = BLOCK_BYTES.get(logits_CV.device.type, BLOCK_BYTES["cuda"])
    block = max(1, size // (4 * logits_CV.shape[1]))
    room = None if logits_CV.dtype == torch.float32 else logits_CV.new_empty(block, logits_CV.shape[1]).float()
    for start in range(0, len(target_C), block):
        own_BV, target_B1 = logits_CV[start : start + block], target_C[start : start + block, None]
        work_BV = own_BV if room is None else room[: len(own_BV)].copy_(own_BV)
        logit_B1, maximum_B1 = work_BV.gather(1, target_B1), work_BV.amax(-1, keepdim=True)
        sum_B1 = work_BV.sub_(maximum_B1).exp_().sum(-1, keepdim=True)
        logp_C[start : start + block] = (logit_B1 - maximum_B1 - sum_B1.log())[:, 0]
        if gradient:
            work_BV.div_(sum_B1).scatter_add_(1, target_B1, torch.full_like(logit_B1, -1.0))
            if room is not None:
                own_BV.copy_(work_BV)
    return logp_C


def compiled_finish(logits_CV: Tensor, target_C: Tensor, gradient: bool) -> Tensor:
    """As `Finish`, by `torch.compile`: on a GPU a few passes over the logits in place of some twelve."""
    if not gradient:
        return _finish(logits_CV, target_C, gradient)
    # Here, not compiled: torch 2.11 was seen to read it after the logits had been written over.
    logit_C = logits_CV.gather(1, target_C[:, None])[:, 0].float()
    return logit_C - _compiled()(logits_CV, target_C)


def _softmax_less_target(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    work_CV = logits_CV.float()
    lse_C1 = work_CV.logsumexp(-1, keepdim=True)
    hit_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device)[None] == target_C[:, None]
    logits_CV.copy_((work_CV - lse_C1).exp() - hit_CV.float())
    return lse_C1[:, 0]


@cache
def _compiled() -> Any:
    return torch.compile(_softmax_less_target)


def weighted_nll(
    hidden_ND: Tensor,
    head_VD: Tensor,
    target_N: Tensor,
    weight_N: Tensor,
    chunk_bytes: int | None = None,
    finish: Finish = _finish,
) -> WeightedNll:
    """Sum of `-weight · log p(target)` under `softmax(hidden @ head.T)`; equals `token_logprobs` weighted and summed.

    Args:
        hidden_ND: hidden states that predict the targets, fp32 or bf16; their dtype is that of the matrix products.
        head_VD: output embedding.
        target_N: int64 token ids.
        weight_N: float32; rows of weight 0 are not computed. Give weights that the loss need not be divided by any more:
            a factor after this costs a pass over the head's gradient.
        chunk_bytes: logits alive at once, about; `CHUNK_BYTES` of the device if left out.
        finish: what is done to a chunk between its products.

    Returns:
        The loss and the log-probs. Gradients flow from the loss to `hidden_ND` and `head_VD`, and are made in this
        call when either needs one and gradients are enabled; the head's is added to its `.grad` in this call within
        `core.gradients.accumulating`.
    """
    chunk = chunk_bytes or CHUNK_BYTES.get(hidden_ND.device.type, CHUNK_BYTES["cuda"])
    with torch.autocast(hidden_ND.device.type, enabled=False):  # dtypes here are chosen by hand
        train = torch.is_grad_enabled()
        room_VD = room_for(head_VD) if train else None
        made: Any = _WeightedNll.apply(hidden_ND, head_VD, target_N, weight_N, train, chunk, finish, room_VD)
        return WeightedNll(*made)
