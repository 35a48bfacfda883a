"""A Llama-like model's layers, computed the way that is fast on a CPU; names and parameters stay as they are.

Three kinds of modules get another `forward`: linear layers (fp32 by `core.matmul`; under bf16 autocast without
autocast's bookkeeping), RMS norms and gated MLPs (`core.layers`). Off the CPU, while compiling, and for every architecture
whose layers are not known here, transformers' own code runs.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tulu_lightning.core.layers import gated_mlp, rms_norm
from tulu_lightning.core.matmul import linear, low_linear

__all__ = ["recompute_mlps", "use_fast_layers"]

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")


def use_fast_layers(module: nn.Module) -> nn.Module:
    """Let a model's layers compute that way; subclasses of the known ones are left alone."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = _Linear
        elif type(part).__name__ in NORMS and type(part).__module__.startswith("transformers."):
            part.__class__ = _over(_Norm, type(part))
        elif type(part).__name__ in MLPS and type(part).__module__.startswith("transformers."):
            part.__class__ = _over(_Mlp, type(part))
    return module


def recompute_mlps(module: nn.Module) -> int:
    """Let every gated MLP that `use_fast_layers` knows keep its input alone for backward; returns how many there are."""
    known = [part for part in module.modules() if isinstance(part, _Mlp)]
    for part in known:
        part.recompute = True
    return len(known)


@cache
def _over(forward: type[nn.Module], known: type[nn.Module]) -> type[nn.Module]:
    """The known class with another `forward` in front; one for all its modules."""
    return type(known.__name__, (forward, known), {})


def _dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of x would run in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _ours(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        dtype = _dtype(input)
        if not _ours(input) or dtype == self.weight.dtype or self.bias is not None:
            return linear(input, self.weight, self.bias)
        return low_linear(input.to(dtype), self.weight, self.low(dtype))

    def low(self, dtype: torch.dtype) -> Tensor:
        """The weight in a dtype: itself, or a fresh copy.

        Not kept from one pass to the next: torch's fused optimisers change weights without raising their version.
        """
        return self.weight if dtype == self.weight.dtype else self.weight.detach().to(dtype)


class _Norm(nn.Module):
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _ours(hidden_states) or hidden_states.dtype == torch.float64:
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, _dtype(hidden_states))


class _Mlp(nn.Module):
    act_fn: Any
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    recompute = False
    """Whether backward computes the inner activations again; see `recompute_mlps`."""

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = (self.gate_proj, self.up_proj, self.down_proj)
        plain = all(type(part) is _Linear and part.bias is None for part in parts)
        if not (plain and _ours(x) and _is_silu(self.act_fn)):  # LoRA, say, puts other modules there
            known: Any = super().forward
            return checkpoint(known, x, use_reentrant=False) if self.recompute and self.training else known(x)
        dtype = _dtype(x)
        gate, up, down = (part.low(dtype) for part in parts)
        weights = (parts[0].weight, parts[1].weight, parts[2].weight)
        with torch.autocast("cpu", enabled=False):
            return gated_mlp(x.to(dtype), weights, (gate, up, down), self.recompute)


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation" or activation is F.silu
