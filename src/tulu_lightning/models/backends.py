"""Which attention a machine can run, and which it should: chosen once, tried before it is trusted, and reported.

| backend | where | packs |
|---|---|---|
| varlen | CUDA, capability 8.0 or more, bf16 | plain documents (flash attention) |
| flex | CUDA with triton | any: prompts shared by several answers, too |
| compiled | CPU with a C++ compiler, heads of a multiple of 16 | any |
| matmul | CPU | any |
| sdpa | everywhere | any |

`auto` takes the first one that the machine can run *and* that computes what `sdpa` does on a few random tokens of the
model's own head shape, forward and backward. So a kernel that is missing, does not compile or is wrong costs speed only.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from tulu_lightning.assets.compiled import KERNELS, load_compiled
from tulu_lightning.errors import InputError
from tulu_lightning.models.fused import Flex, Varlen
from tulu_lightning.models.matmul import MatmulTiles
from tulu_lightning.models.segments import CompiledSegments, segment_kernels
from tulu_lightning.models.tiles import SdpaTiles
from tulu_lightning.types import Span

__all__ = ["Attend", "Chooser", "Machine", "Requested", "candidates", "check_request", "lacks"]

Requested = Literal["auto", "sdpa", "flex", "varlen"]
KEY = "model.init_args.backbone.attention"
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 5e-2}
"""Largest difference from fp32 in a trial, relative to the largest number; fp32 products may be rounded to TF32."""


class Attend(Protocol):
    """A pack prepared for one backend: called once per layer with [1, heads, T, width], gives [1, T, heads, width]."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one layer, in the values' dtype."""
        ...


class Backend(Protocol):
    def __call__(self, spans: Sequence[Span], device: torch.device | None = None) -> Attend: ...


BACKENDS: dict[str, Backend] = {
    "varlen": Varlen,
    "flex": Flex,
    "compiled": CompiledSegments,
    "matmul": MatmulTiles,
    "sdpa": SdpaTiles,
}


class Machine(NamedTuple):
    """What decides on backends."""

    device: str
    """Type of the device: cpu, cuda, ..."""
    capability: tuple[int, int] = (0, 0)
    triton: bool = False

    @staticmethod
    def of(device: str) -> "Machine":
        """The machine that this is, seen from a type of device."""
        if device != "cuda":
            return Machine(device)
        from torch.utils._triton import has_triton

        return Machine(device, torch.cuda.get_device_capability(), has_triton())


def lacks(name: str, dtype: torch.dtype, machine: Machine) -> str | None:
    """Why a machine cannot run a backend in a dtype; None if it should."""
    if name == "compiled" and machine.device == "cpu":
        made = load_compiled(KERNELS / "layers.cpp")
        return None if made.library is not None else made.said
    if name not in ("varlen", "flex"):
        return None
    if machine.device != "cuda":
        return f"it needs a CUDA GPU, and the device is {machine.device}"
    if name == "flex":
        return None if machine.triton else "it needs triton"
    if dtype == torch.float32:
        return "it needs compute_dtype bfloat16"
    if machine.capability < (8, 0):
        return "it needs a GPU of compute capability 8.0, and this one has {}.{}".format(*machine.capability)
    return None


def candidates(requested: Requested, trees: bool, machine: Machine) -> tuple[str, ...]:
    """Backends in the order in which to try them.

    Args:
        requested: the setting. An explicit `varlen` means `flex` for packs with shared prompts: it has no such thing.
        trees: whether segments of the pack continue others.
        machine: where to run.
    """
    if requested == "varlen" and trees:
        return ("flex", "sdpa")
    if requested != "auto":
        return (requested,)
    if machine.device == "cpu":
        return ("compiled", "matmul")
    if machine.device == "cuda":
        return ("flex", "sdpa") if trees else ("varlen", "flex", "sdpa")
    return ("sdpa",)


def check_request(requested: Requested, dtype: torch.dtype) -> None:
    """Refuse an explicit choice that this machine cannot run; costs nothing, so it comes before any weights load.

    Raises:
        InputError: an unknown name, or a backend without its device, dtype or compiler.
    """
    if requested not in ("auto", "sdpa", "flex", "varlen"):
        raise InputError(KEY, f"is {requested!r}", "Use auto, sdpa, flex or varlen.")
    if requested in ("auto", "sdpa"):
        return
    _refuse(requested, lacks(requested, dtype, Machine.of("cuda" if torch.cuda.is_available() else "cpu")))


def _refuse(requested: str, reason: str | None) -> None:
    if reason:
        raise InputError(KEY, f"is {requested}, but {reason}", "Use auto, which takes what the machine can run.")


class Chooser:
    """Chooses the backend of one network, once for plain packs and once for packs with shared prompts."""

    def __init__(self, requested: Requested, dtype: torch.dtype) -> None:
        """Keep the settings.

        Args:
            requested: the setting.
            dtype: of the matrix products.
        """
        self.requested: Requested = requested
        self.dtype = dtype
        self._chosen: dict[tuple[bool, str], str] = {}

    def backend(self, trees: bool, device: torch.device, config: Any) -> Backend:
        """The backend for one kind of pack.

        Args:
            trees: whether segments of the pack continue others.
            device: where it runs.
            config: the model's, for the shape of its heads.

        Raises:
            InputError: an explicit choice that fails here.
        """
        if (trees, device.type) not in self._chosen:
            self._chosen[trees, device.type] = self._choose(trees, device, config)
        return BACKENDS[self._chosen[trees, device.type]]

    def _choose(self, trees: bool, device: torch.device, config: Any) -> str:
        machine = Machine.of(device.type)
        names = candidates(self.requested, trees, machine)
        left_out = []
        for name in names:
            reason = lacks(name, self.dtype, machine) or trial(name, trees, device, self.dtype, config)
            if reason is None:
                _report(name, trees, device.type, self.dtype, tuple(left_out))
                return name
            left_out.append(f"{name}: {reason}")
        raise InputError(KEY, f"is {self.requested}, but {'; '.join(left_out)}", "Use auto.")


@cache
def _report(name: str, trees: bool, device: str, dtype: torch.dtype, left_out: tuple[str, ...]) -> None:
    kind = " for packs with shared prompts" if trees else ""
    why = f"; not {', not '.join(left_out)}" if left_out else ""
    rank_zero_info(f"attention: {name} ({device}, {str(dtype).removeprefix('torch.')}){kind}{why}")


def trial(name: str, trees: bool, device: torch.device, dtype: torch.dtype, config: Any) -> str | None:
    """Run a backend on random tokens, forward and backward; says what is wrong with it, None if nothing is.

    Three sizes: compilers specialise on the first one they see, and on what lies below a block. Once without gradients,
    which compiles another kernel. Backends of PyTorch's plain operations are taken as tested.
    """
    if name not in ("varlen", "flex", "compiled"):
        return None
    config = config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if name == "compiled":
        try:
            segment_kernels(width)
        except RuntimeError as error:
            return str(error)
    return _trial(BACKENDS[name], trees, device, dtype, (heads, key_heads, width))


@cache
@torch.inference_mode(False)
@torch.enable_grad()
def _trial(
    backend: Backend, trees: bool, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]
) -> str | None:
    heads, key_heads, width = shape
    for ends in ((0, 70, 71, 200), (0, 30, 31, 90), (0, 210, 213, 600)):
        parents = (-1, 0, 0) if trees else (-1, -1, -1)
        spans = [Span(start, end, p) for (start, end), p in zip(pairwise(ends), parents, strict=True)]
        generator = torch.Generator().manual_seed(0)  # its own: the run's random state stays as it was
        sizes = [(1, count, ends[-1], width) for count in (heads, key_heads, key_heads)]
        inputs = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
        try:
            found = _numbers(backend, spans, inputs)
            with torch.no_grad():
                found.append(backend(spans, device)(inputs[0], inputs[1], inputs[2], width**-0.5))
        except Exception as error:  # whatever a kernel or its compiler may raise
            return f"it fails here ({(str(error).strip().splitlines() or [type(error).__name__])[0][:200]})"
        wanted = _numbers(SdpaTiles, spans, [x.float() for x in inputs])
        for ours, theirs in zip(found, [*wanted, wanted[0]], strict=True):
            if not (ours.float() - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max():
                return "its numbers are wrong here"
    return None


def _numbers(backend: Backend, spans: Sequence[Span], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Output of a backend and the gradients of its three inputs, for an upstream gradient that is a ramp."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = backend(spans, inputs[0].device)(leaves[0], leaves[1], leaves[2], inputs[0].shape[-1] ** -0.5)
    ramp = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, ramp)]
