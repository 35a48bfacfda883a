"""Checksums of weights: cheap, exact, the same on every device, and different when two elements change places."""

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from tulu_lightning.models.weights import full

__all__ = ["fingerprint", "full", "mark"]

_BLOCK = 1 << 18
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MASK = (1 << 64) - 1


def mark(tensor: Tensor) -> str:
    """Dtype, shape and checksum in one word, e.g. `bfloat16[576,192]:3f0c9e12a7b45d61`.

    The checksum is the sum of (bit pattern of element i) times (odd random weight i), modulo 2^64. Integer sums do not
    depend on their order, so every device gives the same; a changed, moved or swapped element changes the sum.
    """
    bits_N = tensor.detach().contiguous().view(-1)
    if bits_N.numel() % 2 == 0 and bits_N.element_size() == 2:
        bits_N = bits_N.view(torch.int32)  # two at a time
    else:
        bits_N = bits_N.view(_WORDS[bits_N.element_size()])
    total = 0
    for block, part in enumerate(bits_N.split(_BLOCK)):
        weights = _weights(tensor.device)[: len(part)]
        # Each block's own odd factor tells blocks apart; the weights tell places within one.
        total += int((part.to(torch.int64) * weights).sum()) * (2 * block + 1)
    shape = ",".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')}[{shape}]:{total & _MASK:016x}"


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0x7011)
    weights = torch.randint(-(1 << 62), 1 << 62, (_BLOCK,), generator=generator)
    return (weights * 2 + 1).to(device)


def fingerprint(named: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> dict[str, str]:
    """The mark of each named tensor, floating ones first cast to `dtype`, as an engine of that dtype would hold them."""
    marks = {}
    for name, tensor in named:
        whole = full(tensor.detach())
        marks[name] = mark(whole.to(dtype) if dtype is not None and whole.is_floating_point() else whole)
    return marks
