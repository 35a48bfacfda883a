"""AdamW and its schedule, as settings, and the update that they make."""

import importlib.util
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tulu_lightning.core.schedules import ScheduleName, lr_factor
from tulu_lightning.core.settings import require
from tulu_lightning.errors import InputError

__all__ = ["AdamW", "NonFiniteError", "clip", "differing", "sample", "samples"]

FUSED = ("cpu", "cuda", "mps", "xpu")
"""Devices that have a fused AdamW; on CPU it is several times as fast as the default."""
SAMPLE = 1024
"""Weights of one tensor that are watched for whether an update moves them."""


class NonFiniteError(RuntimeError):
    """A network's gradients were not finite for several updates in a row."""


@dataclass(frozen=True)
class AdamW:
    """Settings of one AdamW; betas, eps and decay default to torch's and the paper's."""

    lr: float
    """Peak learning rate."""
    schedule: ScheduleName = "linear"
    warmup_ratio: float = 0.0
    """Share of all steps over which the rate rises."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_norms_and_biases: bool = True
    """Decay vectors too (norms, biases), as the paper's optimiser would. False leaves them out."""
    state_bits: Literal[8, 32] = 32
    """Bits of each of the two moments: 8 takes 2 bytes a trained weight for both in place of 8, and needs torchao."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm when theirs is larger; 0 switches clipping off."""
    max_skipped: int = 5
    """An update whose gradient is not finite is skipped; after so many in a row the run stops."""

    def __post_init__(self) -> None:
        require(0 < self.lr < float("inf"), "optimizer.lr", self.lr, "It must be above 0.")
        for name in ("warmup_ratio", "beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}", value, "It is a share: 0 to below 1.")
        require(0 < self.eps < float("inf"), "optimizer.eps", self.eps, "It must be above 0.")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            require(0 <= value < float("inf"), f"optimizer.{name}", value, "It must be 0 or more.")
        remedy = "It does nothing while weight_decay is 0: leave it out, or set a decay."
        decays = self.decay_norms_and_biases or self.weight_decay > 0
        require(decays, "optimizer.decay_norms_and_biases", self.decay_norms_and_biases, remedy)
        require(self.state_bits in (8, 32), "optimizer.state_bits", self.state_bits, "Use 8 or 32.")
        require(self.max_skipped >= 1, "optimizer.max_skipped", self.max_skipped, "Use at least 1.")

    def check_packages(self) -> None:
        """Refuse 8-bit moments where torchao is not installed; where it is, let checkpoints with its tensors be read.

        Raises:
            InputError: it is not.
        """
        if self.state_bits == 8:
            if importlib.util.find_spec("torchao") is None:
                remedy = "Install it: pip install 'tulu-lightning[qlora]'. Or use 32."
                raise InputError("optimizer.state_bits", "is 8, which needs torchao, and that is not installed", remedy)
            importlib.import_module("torchao.optim")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over those parameters that are trained; fused where the device has that.

        Raises:
            InputError: as `check_packages`.
        """
        trained = [p for p in parameters if p.requires_grad]
        matrices, vectors = ([p for p in trained if (p.ndim < 2) == flat] for flat in (False, True))
        groups = [{"params": trained}]
        if not self.decay_norms_and_biases and vectors:
            groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        common: dict[str, Any] = {"lr": self.lr, "eps": self.eps, "weight_decay": self.weight_decay}
        betas = (self.beta1, self.beta2)
        if self.state_bits == 8:
            self.check_packages()
            from tulu_lightning.stages.adamw8bit import AdamW8bit  # torchao is optional

            return AdamW8bit(groups, betas=betas, **common)
        return torch.optim.AdamW(groups, betas=betas, fused=all(p.device.type in FUSED for p in trained), **common)

    def lr_at(self, step: int, total_steps: int) -> float:
        """Learning rate of global step `step`."""
        return self.lr * lr_factor(step, total_steps, self.schedule, self.warmup_ratio)


def clip(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """The norm of all gradients together (a collective if they are sharded); scales them down to `max_norm` if larger.

    Args:
        parameters: those without a gradient are left out.
        max_norm: 0 leaves the gradients as they are.
    """
    parameters = [p for p in parameters if p.grad is not None]
    grads = [p.grad for p in parameters if p.grad is not None]
    if any(isinstance(grad, DTensor) or grad.dtype != torch.float32 for grad in grads):
        return _clip_parts(grads, max_norm)
    norm = torch.nn.utils.get_total_norm(grads)
    if max_norm and float(norm) > max_norm:  # else the factor is 1, and would cost a pass over them
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


@torch.no_grad()
def _clip_parts(grads: Sequence[Tensor], max_norm: float) -> float:
    """The same for gradients that are sharded, maybe not all over the same ranks: one number is summed over all.

    PyTorch's own functions take the gradients of one mesh only, and round the norm of bf16 ones to bf16.
    """
    meshes = [grad.device_mesh for grad in grads if isinstance(grad, DTensor)]
    device = torch.device(meshes[0].device_type) if meshes else grads[0].device
    world = dist.get_world_size() if meshes else 1
    many: Any = torch  # its operations on many tensors at once have names that begin with _
    locals_ = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    norms = torch.stack(many._foreach_norm(locals_, dtype=torch.float32)).cpu().double()
    copies = torch.tensor([world / _owners(grad) for grad in grads], dtype=torch.float64)
    total = (norms.square() / copies).sum().to(device)
    if world > 1:
        dist.all_reduce(total)
    norm = float(total) ** 0.5
    if max_norm and norm > max_norm:
        many._foreach_mul_(locals_, max_norm / (norm + 1e-6))
    return norm


def _owners(tensor: Tensor) -> int:
    """Over how many ranks a tensor is cut; all others hold the same again."""
    if not isinstance(tensor, DTensor):
        return 1
    placements = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in placements if not placement.is_replicate())


def samples(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Copies of some weights of each tensor that is trained and stored in bf16 (this rank's part of it)."""
    return [sample(one) for one in parameters if one.requires_grad and one.dtype == torch.bfloat16]


def sample(tensor: Tensor) -> Tensor:
    """A copy of some elements of a tensor (of this rank's part of it), evenly spread: all of up to twice `SAMPLE`."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    flat = own.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE)].clone()


def differing(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """How many of the sampled weights differ, and how many there are; float64, on the CPU."""
    changed = sum(int((one != other).sum()) for one, other in zip(before, after, strict=True))
    return torch.tensor([changed, sum(map(len, before))], dtype=torch.float64)
