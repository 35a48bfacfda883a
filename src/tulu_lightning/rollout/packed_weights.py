"""Weights laid out for products with few rows: fused along the output, and packed by oneDNN where it can.

A decoding step multiplies a few dozen rows by every matrix of the model, so reading the matrices is most of its time.
oneDNN reads its own packed layout about 1.5 times as fast as a plain matrix (bf16, 32 rows). The operators are PyTorch's
own but not public: they are used only where a trial gives what a plain product gives, else `linear` is.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tulu_lightning.core.matmul import linear

__all__ = ["Matrix", "fuse", "packs"]

ROWS = 32
"""Rows that oneDNN lays the weights out for; measured as good from 1 to 256."""


@functools.cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this machine multiplies by packed weights of this dtype, gives them back unchanged, and gets it right."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 64, generator=generator).to(dtype) for rows in (48, 5))
    try:
        packed = _pack(weight)
        plain, other = F.linear(x, weight), torch.ones(len(x), len(weight), dtype=dtype) / 3
        tried = {
            _product(x, packed, None): plain,
            _sum(x, packed, None, other): plain + other,
        }
        near = all(torch.allclose(found, right, rtol=0.02, atol=0.1) for found, right in tried.items())
        return near and torch.equal(packed.to_dense(), weight)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False


def _pack(weight_NK: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight_NK, ROWS)


def _product(x: Tensor, packed: Tensor, bias_N: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias_N, "none", [], "")


def _sum(x: Tensor, packed: Tensor, bias_N: Tensor | None, other: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, bias_N, "add")


class Matrix:
    """One product with weights that lie in a plain matrix, which is the truth, and perhaps in a packed copy of it.

    Args:
        names: of the weights in the state dict whose rows it holds, top to bottom, with their numbers of rows.
        weight_NK: the plain matrix; whoever writes to it calls `pack` afterwards.
        bias_N: added to the product.
    """

    def __init__(self, names: Sequence[tuple[str, int]], weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
        self.names, self.weight_NK, self.bias_N = tuple(names), weight_NK, bias_N
        self.packed: Tensor | None = None
        self.pack()

    @torch.no_grad()
    def pack(self) -> None:
        """Make the packed copy anew from the plain matrix."""
        on_cpu = self.weight_NK.device.type == "cpu"
        self.packed = _pack(self.weight_NK) if on_cpu and packs(self.weight_NK.dtype) else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        if self.packed is None:
            return linear(x, self.weight_NK, self.bias_N)
        return _product(x, self.packed, self.bias_N)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """Product plus `other` [..., N], in one pass."""
        return self(x) + other if self.packed is None else _sum(x, self.packed, self.bias_N, other)

    def used(self) -> Iterator[tuple[str, Tensor]]:
        """Each weight by its name as it is read back from what products are made with, not from the plain matrix."""
        whole_NK = self.weight_NK if self.packed is None else self.packed.to_dense()
        names, rows = zip(*self.names, strict=True)
        yield from zip(names, whole_NK.split(rows), strict=True)


def fuse(layers: Sequence[tuple[str, Any]]) -> Matrix:
    """One matrix of several linear layers of one input; the layers' weights become views of it and take no more memory.

    Args:
        layers: name and `nn.Linear` of each; all with a bias or none.
    """
    weights = [layer.weight.detach() for _, layer in layers]
    whole_NK = torch.cat(weights) if len(weights) > 1 else weights[0]
    rows = [len(weight) for weight in weights]
    bias_N = _own_biases([layer for _, layer in layers])
    for (_, layer), part in zip(layers, whole_NK.split(rows), strict=True):
        layer.weight.data = part
    return Matrix([(f"{name}.weight", count) for (name, _), count in zip(layers, rows, strict=True)], whole_NK, bias_N)


def _own_biases(layers: Sequence[nn.Linear]) -> Tensor | None:
    if layers[0].bias is None:
        return None
    whole_N = torch.cat([layer.bias.detach() for layer in layers])
    for layer, part in zip(layers, whole_N.split([len(layer.bias) for layer in layers]), strict=True):
        layer.bias.data = part
    return whole_N
