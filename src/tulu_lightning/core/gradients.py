"""Gradients that are added where they belong, instead of handed to autograd to be added there.

The two largest gradients of a small model, those of the embedding and of the head, are made in tensors of the whole
vocabulary: zeros, some rows of them set, and then added to what earlier micro-batches left. On a CPU fresh zeros of that
size cost a tenth of a step (each page of them is asked of the system), and they are there when memory is short. So within
`accumulating` the functions that make them add to the parameter's `.grad` and give autograd nothing.

That is right only where `.grad` is what is read in the end: not with `torch.autograd.grad`, nor for parameters that are
sharded or have hooks. Therefore nothing does it unless it is asked to.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["accumulating", "room_for"]

_on = ContextVar("accumulating", default=False)


@contextmanager
def accumulating(on: bool = True) -> Iterator[None]:
    """Within this, on the CPU, the gradients of embedding and head are added to `.grad` by the functions that make them.

    A loss of `core.nll` does so in its forward: it must be made in here only if its backward follows, with factor 1.

    Args:
        on: whether; a False turns it off within.
    """
    token = _on.set(on)
    try:
        yield
    finally:
        _on.reset(token)


def room_for(parameter: Tensor) -> Tensor | None:
    """Where to add a parameter's gradient: its `.grad`, made of zeros if there was none.

    Args:
        parameter: that needs a gradient.

    Returns:
        The tensor that is its `.grad` now; None where autograd is to have the gradient: outside of `accumulating`, off
        the CPU, of what is no plain parameter, and of one stored in bf16, where each small part that is added to a sum
        would be rounded to the sum's digits.
    """
    plain = type(parameter) in (Tensor, torch.nn.Parameter) and parameter.is_leaf and parameter.requires_grad
    wide = parameter.device.type == "cpu" and parameter.dtype == torch.float32
    if not (_on.get() and plain and wide) or _hooked(parameter):
        return None
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, requires_grad=False)
    return parameter.grad


def _hooked(parameter: Tensor) -> bool:
    """Whether somebody waits for autograd to bring the gradient."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))
