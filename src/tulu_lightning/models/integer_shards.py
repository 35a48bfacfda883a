"""FSDP2 over codes of 4 bits in torch before 2.13, which makes every shard a parameter that takes a gradient.

Integers cannot take one, so building the shard fails. Newer versions pass on what the whole parameter says. Here the
name by which that file makes parameters is another one while modules are sharded, and for no longer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["integer_shards"]

SINCE = (2, 13)
"""Version of torch that needs none of this."""


@contextmanager
def integer_shards(module: nn.Module) -> Iterator[None]:
    """Let `fully_shard` take parameters of integers; does nothing where there are none, or torch takes them itself."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version >= SINCE or all(parameter.is_floating_point() for parameter in module.parameters()):
        yield
        return
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    maker: Any = _fsdp_param
    known = maker.nn
    maker.nn = SimpleNamespace(Module=nn.Module, Parameter=_parameter)
    try:
        yield
    finally:
        maker.nn = known


def _parameter(data: Tensor, requires_grad: bool = True) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=requires_grad and data.is_floating_point())
