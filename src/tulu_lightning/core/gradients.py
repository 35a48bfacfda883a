"""Gradients that are added where they belong, instead of handed to autograd to be added there.

The two largest gradients of a small model, those of the embedding and of the head, are made in tensors of the whole
vocabulary: zeros, some rows of them set, and then added to what earlier micro-batches left. On a CPU fresh zeros of that
size cost a tenth of a step (each page of them is asked of the system), and they are there when memory is short. So within
`accumulating` the functions that make them add to the parameter's `.grad` and give autograd nothing; and a linear layer's
product is added to the sum of those before while it is made.

That is right only where `.grad` is what is read in the end: not with `torch.autograd.grad`, nor for parameters that are
sharded or have hooks. Therefore nothing does it unless it is asked to.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["PLAIN", "accumulating", "room_for", "room_of"]

PLAIN = (Tensor, torch.nn.Parameter)
"""Not DTensors or other subclasses: what works on memory knows nothing of them."""

_on = ContextVar("accumulating", default=False)


@contextmanager
def accumulating(on: bool = True) -> Iterator[None]:
    """Within this, on the CPU, gradients of matrices are added to `.grad` by the functions that make them.

    A loss of `core.nll` does so in its forward: it must be made in here only if its backward follows, with factor 1.

    Args:
        on: whether; a False turns it off within.
    """
    token = _on.set(on)
    try:
        yield
    finally:
        _on.reset(token)


def room_of(parameter: Tensor) -> Tensor | None:
    """A parameter's `.grad`, where its gradient may be added to that.

    Args:
        parameter: that needs a gradient.

    Returns:
        None where autograd is to have the gradient: where there is none yet, outside of `accumulating`, off the CPU, of
        what is no plain parameter, and of one stored in bf16, where each small part that is added to a sum would be
        rounded to the sum's digits.
    """
    return parameter.grad if _may(parameter) else None


def room_for(parameter: Tensor) -> Tensor | None:
    """The same, made of zeros if there was none."""
    if not _may(parameter):
        return None
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, requires_grad=False)
    return parameter.grad


def _may(parameter: Tensor) -> bool:
    plain = type(parameter) in PLAIN and parameter.is_leaf and parameter.requires_grad
    wide = parameter.device.type == "cpu" and parameter.dtype == torch.float32
    return _on.get() and plain and wide and not _hooked(parameter)


def _hooked(parameter: Tensor) -> bool:
    """Whether somebody waits for autograd to bring the gradient."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))
