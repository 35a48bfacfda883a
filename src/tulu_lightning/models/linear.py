"""A Llama-like model's layers, computed the way that is fast on a CPU; names and parameters stay as they are.

Five kinds of modules get another `forward`: linear layers (fp32 by `core.matmul`; under bf16 autocast without
autocast's bookkeeping), embeddings, RMS norms and gated MLPs (`models.layers`), and attention (the rotary embedding of
`models.layers`). Off the CPU, while compiling, and for every architecture whose layers are not known here, transformers'
own code runs.
"""

import os
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tulu_lightning.core.matmul import fp32_library, linear, low_linear
from tulu_lightning.models.attention import segment_attention
from tulu_lightning.models.layers import embed, gated, gated_mlp, rms_norm, rotary

__all__ = ["recompute_mlps", "use_fast_layers"]

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
ATTENTIONS = ("LlamaAttention", "Qwen2Attention", "Qwen3Attention")
MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")


KERNELS = 64
"""Kernels that oneDNN keeps: those of a micro-batch are some 20, every other number of tokens has its own, and the 1,024
that it keeps by itself take 0.3 GB."""


def use_fast_layers(module: nn.Module) -> nn.Module:
    """Let a model's layers compute that way; subclasses of the known ones are left alone."""
    if fp32_library() == "default":  # else fp32 products and attention are oneDNN's too, which takes more of them
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))  # read at its first product
    kinds = ((NORMS, _Norm), (ATTENTIONS, _Attention), (MLPS, _Mlp))
    known = {name: forward for names, forward in kinds for name in names}
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = _Linear
        elif type(part) is nn.Embedding:
            part.__class__ = _Embedding
        elif type(part).__module__.startswith("transformers.") and type(part).__name__ in known:
            part.__class__ = _over(known[type(part).__name__], type(part))
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
        if not _ours(input) or self.bias is not None or type(self.weight) is not nn.Parameter:
            return linear(input, self.weight, self.bias)
        return low_linear(input.to(dtype), self.weight, self.low(dtype))

    def low(self, dtype: torch.dtype) -> Tensor:
        """The weight in a dtype, without a gradient: itself, or a fresh copy.

        Not kept from one pass to the next: torch's fused optimisers change weights without raising their version.
        """
        return self.weight.detach().to(dtype)


class _Embedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        plain = self.max_norm is None and not self.scale_grad_by_freq and not self.sparse
        trained = torch.is_grad_enabled() and self.weight.requires_grad
        if not (plain and trained and _ours(input)):
            return super().forward(input)
        return embed(input, self.weight, self.padding_idx)


class _Norm(nn.Module):
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _ours(hidden_states) or hidden_states.dtype == torch.float64:
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, _dtype(hidden_states))


class _Attention(nn.Module):
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int
    scaling: float

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, *args: Any, **kwargs: Any) -> Any:
        packed = kwargs.get("segments") is not None and not args and kwargs.get("past_key_values") is None
        if not (packed and position_embeddings is not None and _ours(hidden_states)):
            known: Any = super().forward
            return known(hidden_states, position_embeddings, *args, **kwargs)
        heads = lambda x: x.unflatten(-1, (-1, self.head_dim))  # noqa: E731
        query, key, value = (heads(part(hidden_states)) for part in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            norms: Any = self
            query, key = norms.q_norm(query), norms.k_norm(key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        query, key = (rotary(x, *position_embeddings) for x in (query, key))
        window = getattr(self, "sliding_window", None)
        settings = {"scaling": self.scaling, "sliding_window": window, **kwargs}
        out, none = segment_attention(self, query, key, value, settings.pop("attention_mask", None), **settings)
        return self.o_proj(out.flatten(-2)), none


class _Mlp(nn.Module):
    act_fn: Any
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    recompute = False
    """Whether backward computes the inner activations again; see `recompute_mlps`."""

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = (self.gate_proj, self.up_proj, self.down_proj)
        if not (_ours(x) and _is_silu(self.act_fn) and type(x) is Tensor):
            return self._kept(super().forward, x)
        if not all(type(part) is _Linear and part.bias is None for part in parts):  # LoRA, say, puts others there
            return self._kept(lambda x: parts[2](gated(parts[0](x), parts[1](x))), x)
        dtype = _dtype(x)
        gate, up, down = (part.low(dtype) for part in parts)
        weights = (parts[0].weight, parts[1].weight, parts[2].weight)
        with torch.autocast("cpu", enabled=False):
            return gated_mlp(x.to(dtype), weights, (gate, up, down), self.recompute)

    def _kept(self, forward: Any, x: Tensor) -> Tensor:
        return checkpoint(forward, x, use_reentrant=False) if self.recompute and self.training else forward(x)


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation" or activation is F.silu
