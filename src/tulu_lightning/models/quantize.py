"""A frozen 4-bit base (QLoRA, Dettmers et al. 2023): the decoder's matrices in NF4 or FP4 by bitsandbytes' kernels.

`Linear4bit` is a module of our own around those kernels, not bitsandbytes' layer. That one keeps scales outside of what a
module moves, shards and gathers, and repacks weights in place on some CPUs when not training, which FSDP2 then gathers as
something else. Here codes and block scales are ordinary parameters: FSDP2 shards them both, by rows.

Embeddings, norms, biases, the output head and scalar heads stay as they are.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from tulu_lightning.core.matmul import product
from tulu_lightning.core.settings import require
from tulu_lightning.errors import InputError
from tulu_lightning.models.weights import fill, full

__all__ = ["Linear4bit", "Packed4bit", "Quantize", "check_bitsandbytes", "pack", "quantize"]

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What bitsandbytes knows."""
NESTED_BLOCK = 256
"""Block scales that share one scale of their own; bitsandbytes has this one alone."""


@dataclass(frozen=True)
class Quantize:
    """Keep the decoder's matrices in 4 bits; they are frozen, and `lora` trains beside them."""

    kind: Literal["nf4", "fp4"] = "nf4"
    """The 16 levels: `nf4` is made for normal weights (about 9% of their size is lost), `fp4` is a small float (12%)."""
    blocksize: int = 64
    """Neighbours in a row that share a scale: 32 to 4,096, a power of 2. Smaller ones lose less and take more memory."""
    double_quant: bool = True
    """Keep the scales in 8 bits: 0.52 bytes a weight in place of 0.56, at 64 weights a scale."""
    storage: Literal["uint8", "bfloat16"] = "uint8"
    """Dtype that the codes go by, which changes nothing of what they say. bfloat16 is for tools that want every sharded
    tensor in one dtype; on CUDA such tensors were reported to change on their way (bitsandbytes issue 1945)."""

    def __post_init__(self) -> None:
        require(self.kind in ("nf4", "fp4"), "quantize.kind", repr(self.kind), "Use nf4 or fp4.")
        remedy = f"Use one of {', '.join(map(str, BLOCKS))}."
        require(self.blocksize in BLOCKS, "quantize.blocksize", self.blocksize, remedy)
        known = self.storage in ("uint8", "bfloat16")
        require(known, "quantize.storage", repr(self.storage), "Use uint8 or bfloat16.")


@dataclass(frozen=True)
class Packed4bit:
    """One matrix [N, K] in 4 bits.

    Attributes:
        weight: codes, two a byte: uint8 [N, K/2], or the same bytes as bfloat16 [N, K/4].
        scale: bytes of the block scales: uint8 [N, bytes of a row], or [1, all of them] where blocks cross rows.
            The scales are 8-bit codes (`double_quant`) or fp32.
        nested: bytes of the fp32 scales of the scales, and of their offset at the end; None without `double_quant`.
    """

    weight: Tensor
    scale: Tensor
    nested: Tensor | None


def check_bitsandbytes() -> None:
    """Refuse 4 bits where bitsandbytes is not installed.

    Raises:
        InputError: it is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        remedy = "Install it: pip install 'tulu-lightning[qlora]'. Or leave quantize out."
        raise InputError("backbone.quantize", "needs bitsandbytes, which is not installed", remedy)


@torch.no_grad()
def pack(weight_NK: Tensor, settings: Quantize) -> Packed4bit:
    """Quantise one matrix, on its own device.

    Args:
        weight_NK: floating point; it is read in fp32.
        settings: how.
    """
    from bitsandbytes.functional import quantize_4bit  # optional, and slow to import

    rows = len(weight_NK)
    codes, state = quantize_4bit(
        weight_NK.float().contiguous(),
        blocksize=settings.blocksize,
        compress_statistics=settings.double_quant,
        quant_type=settings.kind,
    )
    weight = codes.view(rows, -1).view(getattr(torch, settings.storage))
    whole_rows = weight_NK.shape[1] % settings.blocksize == 0
    absmax: Any = state.absmax
    scale = absmax.view(torch.uint8).view(rows if whole_rows else 1, -1)
    if not settings.double_quant:
        return Packed4bit(weight, scale, None)
    assert state.state2 is not None
    offset: Any = state.offset
    nested = torch.cat([state.state2.absmax, offset.view(1)])
    return Packed4bit(weight, scale, nested.view(torch.uint8))


class Linear4bit(nn.Linear):
    """A frozen linear layer whose matrix is kept in 4 bits and read anew for every product."""

    def __init__(self, linear: nn.Linear, settings: Quantize) -> None:
        """Take a layer's place; its matrix is quantised, unless it is on meta.

        Args:
            linear: the layer; its bias goes on being used.
            settings: how.
        """
        nn.Module.__init__(self)  # nn.Linear's makes and fills a matrix
        self.in_features, self.out_features, self.settings = linear.in_features, linear.out_features, settings
        packed = _empty(linear, settings) if linear.weight.is_meta else pack(linear.weight, settings)
        self.weight = nn.Parameter(packed.weight, requires_grad=False)
        self.scale = nn.Parameter(packed.scale, requires_grad=False)
        self.register_buffer("nested", packed.nested, persistent=False)
        self.register_parameter("bias", linear.bias)

    @torch.no_grad()
    def take(self, weight_NK: Tensor) -> None:
        """Quantise a matrix into this layer's memory, of which a sharded layer holds some rows.

        Args:
            weight_NK: the whole matrix, on any device.
        """
        packed = pack(weight_NK.to(self.weight.device), self.settings)
        for name in ("weight", "scale", "nested"):
            if (whole := getattr(packed, name)) is not None:
                fill(getattr(self, name), whole)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """[N, K]: the matrix that the codes stand for. Sharded, all ranks must call."""
        return self._read(full(self.weight), full(self.scale), dtype)

    def _read(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

        # One row: bitsandbytes 0.50's CPU kernel reads the scales of more as if each row began a block.
        shape = torch.Size((1, self.out_features * self.in_features))
        block, kind = self.settings.blocksize, self.settings.kind
        scale = scale.detach().reshape(-1)
        held: Any = self.nested
        if held is None:
            absmax = scale.view(torch.float32)
        else:
            nested: Any = held.view(torch.float32)
            outer = {"absmax": nested[:-1], "code": _levels(scale.device), "blocksize": NESTED_BLOCK}
            absmax = dequantize_blockwise(scale, **outer) + nested[-1]
        state = QuantState(absmax, shape, blocksize=block, quant_type=kind, dtype=dtype)
        flat = dequantize_4bit(weight.detach().view(torch.uint8).reshape(-1, 1), state)
        return flat.view(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """As of a linear layer, in autocast's dtype if it is on, else in that of the input."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        x_MK = input.to(dtype).reshape(-1, self.in_features)
        product: Any = self._product  # a decorated method, of which type checkers know too little
        out = product(x_MK).view(*input.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(dtype)

    @torch.compiler.disable  # which traces neither a layer as an argument nor every library that `product` takes
    def _product(self, x_MK: Tensor) -> Any:
        return _Product.apply(x_MK, self.weight, self.scale, self)

    def extra_repr(self) -> str:
        """Sizes and settings."""
        return f"{self.in_features}, {self.out_features}, {self.settings}"


class _Product(torch.autograd.Function):
    """x @ W.T; W is read from its codes in both passes, and never kept."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight: Tensor, scale: Tensor, layer: Linear4bit) -> Tensor:
        ctx.save_for_backward(weight, scale)  # what FSDP2 gathers into again before backward
        ctx.layer = layer
        return product(x_MK, layer._read(weight, scale, x_MK.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        grad_MN = grads[0].contiguous()
        matrix_NK = ctx.layer._read(*ctx.saved_tensors, grad_MN.dtype)
        return product(grad_MN, matrix_NK.T), None, None, None


@cache
def _levels(device: torch.device) -> Tensor:
    """The 256 values that 8-bit scales have."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map().to(device)


def quantize(lm: PreTrainedModel, settings: Quantize, folder: str) -> None:
    """Put a `Linear4bit` in the place of each linear layer of a model's decoder; one matrix at a time is in both forms.

    Of a model on meta the layers are empty, to be filled by `Linear4bit.take`.

    Args:
        lm: the model, without adapters.
        settings: how.
        folder: where it came from, for the message.

    Raises:
        InputError: bitsandbytes is missing, there are no such layers, or a row of one cannot be packed.
    """
    check_bitsandbytes()
    decoder: Any = lm.get_decoder()
    layers = [(name, part) for name, part in decoder.named_modules() if isinstance(part, nn.Linear)]
    if not layers:
        raise InputError(folder, "its decoder has no linear layers to keep in 4 bits", "Leave out quantize.")
    unit = 2 * getattr(torch, settings.storage).itemsize
    for name, part in layers:
        if part.in_features % unit:
            what = f"{name} has rows of {part.in_features} numbers, and {settings.storage} packs {unit} together"
            raise InputError(folder, what, "Give another model, or leave out quantize.")
        parent, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(parent), leaf, Linear4bit(part, settings))


def _empty(linear: nn.Linear, settings: Quantize) -> Packed4bit:
    """What `pack` gives, on meta."""
    rows, columns = linear.weight.shape
    storage = getattr(torch, settings.storage)
    blocks = -(-rows * columns // settings.blocksize)
    bytes_ = blocks if settings.double_quant else 4 * blocks
    lines = 1 if columns % settings.blocksize else rows
    nested = 4 * (-(-blocks // NESTED_BLOCK) + 1)
    empty = lambda *shape, dtype=torch.uint8: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    weight = empty(rows, columns // (2 * storage.itemsize), dtype=storage)
    return Packed4bit(weight, empty(lines, bytes_ // lines), empty(nested) if settings.double_quant else None)
