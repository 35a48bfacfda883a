"""`assets/kernels/tiles.cpp` as functions of tensors: products of a few rows in bf16, on processors with AMX.

oneDNN's packed product reads a matrix of a small model at 14 to 30 GB/s for 32 rows, this one at 36 to 42 (SmolLM2 on a
Xeon, two cores). Used only where a trial gives what PyTorch's own product gives.
"""

import ctypes
import functools

import torch
from torch import Tensor

from tulu_lightning.assets.compiled import KERNELS, load_compiled

__all__ = ["MOST_ROWS", "Tiled", "tiled"]

MOST_ROWS = 256
"""More are multiplied by the plain matrix: reading it is then no longer what takes the time."""


class Tiled:
    """Matrices laid out as tiles.

    Args:
        library: of tiles.cpp.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, whole, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._pack, self._product = library.tiles_pack, library.tiles_product
        self._pack.argtypes = [pointer, pointer, whole, whole, number, number]
        self._product.argtypes = [*[pointer] * 5, *[whole] * 3, number]
        self._pack.restype = self._product.restype = None

    @staticmethod
    def fits(weight_NK: Tensor) -> bool:
        """Whether a matrix can be laid out so."""
        outputs, inputs = weight_NK.shape
        cpu, low = weight_NK.device.type == "cpu", weight_NK.dtype is torch.bfloat16
        return cpu and low and outputs % 32 == 0 and inputs % 32 == 0 and weight_NK.is_contiguous()

    def pack(self, weight_NK: Tensor) -> Tensor:
        """The matrix as tiles; still [N, K], but its numbers lie elsewhere."""
        packed = torch.empty_like(weight_NK)
        self._pack(weight_NK.data_ptr(), packed.data_ptr(), *weight_NK.shape, 0, torch.get_num_threads())
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        """The matrix [N, K] that `pack` was given."""
        weight_NK = torch.empty_like(packed)
        self._pack(weight_NK.data_ptr(), packed.data_ptr(), *packed.shape, 1, torch.get_num_threads())
        return weight_NK

    def product(self, x_RK: Tensor, packed: Tensor, bias_N: Tensor | None, other_RN: Tensor | None = None) -> Tensor:
        """x W^T + bias + other, [R, N], summed in fp32 and rounded once."""
        x_RK, rows = x_RK.contiguous(), len(x_RK)
        other_RN = None if other_RN is None else other_RN.contiguous()
        out_RN = x_RK.new_empty(rows, len(packed))
        at = [None if each is None else each.data_ptr() for each in (bias_N, other_RN)]
        self._product(
            x_RK.data_ptr(), packed.data_ptr(), *at, out_RN.data_ptr(), rows, *packed.shape, torch.get_num_threads()
        )
        return out_RN


@functools.cache
def tiled() -> Tiled | None:
    """The functions, or None where the processor has no tiles, nothing compiles, or the numbers are not right."""
    library = load_compiled(KERNELS / "tiles.cpp").library
    if library is None or not library.tiles_ready():
        return None
    found, generator = Tiled(library), torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(torch.bfloat16)  # noqa: E731
    weight, bias = draw(96, 64), draw(96)
    packed = found.pack(weight)
    if not torch.equal(found.unpack(packed), weight):
        return None
    for rows in (1, 16, 17, 40):
        x, other = draw(rows, 64), draw(rows, 96)
        for added in ((None, None), (bias, None), (bias, other)):
            right = x.float() @ weight.float().T + sum(each.float() for each in added if each is not None)
            made = found.product(x, packed, *added).float()
            if not ((made - right).abs() <= 0.02 * right.abs() + 0.02).all():
                return None
    return found
