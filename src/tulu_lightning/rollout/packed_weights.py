"""Weights laid out for products with few rows: fused along the output, and packed as tiles, or by oneDNN, where that can be.

A decoding step multiplies a few dozen rows by every matrix of the model, so reading the matrices is most of its time. On
processors with AMX `rollout.tiles` reads them fastest (bf16). Elsewhere oneDNN reads its own packed layout about 1.5 times as
fast as a plain matrix; those operators are PyTorch's own but not public. Both are used only where a trial gives what a plain
product gives, else `linear` is.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tulu_lightning.core.matmul import linear
from tulu_lightning.rollout.tiles import MOST_ROWS, Tiled, tiled

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
        compiled: whether to lay it out as tiles where that can be (`rollout.tiles`).
    """

    def __init__(
        self,
        names: Sequence[tuple[str, int]],
        weight_NK: Tensor,
        bias_N: Tensor | None = None,
        compiled: bool = True,
    ) -> None:
        self.names, self.weight_NK, self.bias_N = tuple(names), weight_NK, bias_N
        self.packed: Tensor | None = None
        self.tiles = tiled() if compiled and Tiled.fits(weight_NK) else None
        self.pack()

    @torch.no_grad()
    def pack(self) -> None:
        """Make the packed copy anew from the plain matrix."""
        if self.tiles is not None:
            self.packed = self.tiles.pack(self.weight_NK)
            return
        on_cpu = self.weight_NK.device.type == "cpu"
        self.packed = _pack(self.weight_NK) if on_cpu and packs(self.weight_NK.dtype) else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        if self.tiles is not None and self.packed is not None and len(x) <= MOST_ROWS:
            return self.tiles.product(x, self.packed, self.bias_N)
        packed = self._by_onednn()
        return linear(x, self.weight_NK, self.bias_N) if packed is None else _product(x, packed, self.bias_N)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """Product plus `other` [T, N], in one pass."""
        if self.tiles is not None and self.packed is not None and len(x) <= MOST_ROWS:
            return self.tiles.product(x, self.packed, self.bias_N, other)
        packed = self._by_onednn()
        return self(x) + other if packed is None else _sum(x, packed, self.bias_N, other)

    def _by_onednn(self) -> Tensor | None:
        """The matrix as oneDNN packs it: made anew for the many rows of prompts where decoding has tiles."""
        if self.tiles is None:
            return self.packed
        return _pack(self.weight_NK) if packs(self.weight_NK.dtype) else None

    def used(self) -> Iterator[tuple[str, Tensor]]:
        """Each weight by its name as it is read back from what products are made with, not from the plain matrix."""
        if self.packed is None:
            whole_NK = self.weight_NK
        else:
            whole_NK = self.packed.to_dense() if self.tiles is None else self.tiles.unpack(self.packed)
        names, rows = zip(*self.names, strict=True)
        yield from zip(names, whole_NK.split(rows), strict=True)


def fuse(layers: Sequence[tuple[str, Any]], compiled: bool = True) -> Matrix:
    """One matrix of several linear layers of one input; the layers' weights become views of it and take no more memory.

    Args:
        layers: name and `nn.Linear` of each; all with a bias or none.
        compiled: as for `Matrix`.
    """
    weights = [layer.weight.detach() for _, layer in layers]
    whole_NK = torch.cat(weights) if len(weights) > 1 else weights[0]
    rows = [len(weight) for weight in weights]
    bias_N = _own_biases([layer for _, layer in layers])
    for (_, layer), part in zip(layers, whole_NK.split(rows), strict=True):
        layer.weight.data = part
    names = [(f"{name}.weight", count) for (name, _), count in zip(layers, rows, strict=True)]
    return Matrix(names, whole_NK, bias_N, compiled)


def _own_biases(layers: Sequence[nn.Linear]) -> Tensor | None:
    if layers[0].bias is None:
        return None
    whole_N = torch.cat([layer.bias.detach() for layer in layers])
    for layer, part in zip(layers, whole_N.split([len(layer.bias) for layer in layers]), strict=True):
        layer.bias.data = part
    return whole_N
