"""The forward pass of a Llama-shaped model over a flat axis of tokens, for decoding: few operations a layer, few rows.

Llama-shaped: RMS norms before attention and MLP, rotary positions, grouped keys, a gated MLP, all tokens visible.
`recognise` decides by structure, then by comparing logits with the model's own forward.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tulu_lightning.rollout.compiled import Kernels, kernels
from tulu_lightning.rollout.packed_weights import Matrix, fuse

__all__ = ["Attend", "Causal", "LlamaLM", "recognise"]

Attend = Callable[[int, Tensor], Tensor]
"""(layer, queries, keys and values [T, H + K + K, d]) -> what they attend to, [T, H x d]. The queries are scaled."""

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest difference from the model's own logits, relative to the largest logit. Rounding leaves 1e-5 in fp32 and 1e-2 in bf16."""

_log = logging.getLogger(__name__)


class _Norm:
    """RMS norm as the model's own, in two thirds of its operations, or compiled."""

    def __init__(self, module: Any, compiled: Kernels | None) -> None:
        self.weight_D: Tensor = module.weight
        self.epsilon, self.compiled = float(module.variance_epsilon), compiled
        self.eps = torch.tensor(module.variance_epsilon, device=module.weight.device)

    def __call__(self, x_TD: Tensor) -> Tensor:
        if self.compiled is not None:
            return self.compiled.norm(x_TD, self.weight_D, self.epsilon)
        wide_TD = x_TD.float()
        norm_T1 = torch.linalg.vector_norm(wide_TD, dim=-1, keepdim=True)
        rms_T1 = torch.addcmul(self.eps, norm_T1, norm_T1, value=1 / x_TD.shape[-1]).rsqrt_()
        return (wide_TD * rms_T1).to(x_TD.dtype) * self.weight_D


class _Layer(NamedTuple):
    norm: _Norm
    qkv: Matrix
    out: Matrix
    mlp_norm: _Norm
    gate_up: Matrix
    down: Matrix


class LlamaLM:
    """The weights of a recognised model, fused and packed, and its forward pass.

    Args:
        model: its linear layers' weights become views of the fused matrices.
        compiled: whether to use compiled functions where there are some (`rollout.compiled`), in `compiled` then.
    """

    def __init__(self, model: PreTrainedModel, compiled: bool = True) -> None:
        decoder: Any = model.get_decoder()
        names = {id(module): name for name, module in model.named_modules()}

        def fused(*linears: Any) -> Matrix:
            return fuse([(names[id(each)], each) for each in linears], compiled)

        first = decoder.layers[0].self_attn
        self.model, self.decoder, self.head = model, decoder, fused(model.get_output_embeddings())
        self.width = int(first.head_dim)
        self.heads = first.q_proj.out_features // self.width
        self.key_heads = first.k_proj.out_features // self.width
        shape = (self.heads, self.key_heads, self.width)
        one_dtype = {weight.dtype for weight in model.parameters()} == {model.dtype}
        self.compiled = kernels(model.device.type, model.dtype, *shape) if compiled and one_dtype else None
        self.norm = _Norm(decoder.norm, self.compiled)
        self.scale: float = getattr(first, "scaling", self.width**-0.5)
        self.layers = [
            _Layer(
                _Norm(layer.input_layernorm, self.compiled),
                fused(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                fused(layer.self_attn.o_proj),
                _Norm(layer.post_attention_layernorm, self.compiled),
                fused(layer.mlp.gate_proj, layer.mlp.up_proj),
                fused(layer.mlp.down_proj),
            )
            for layer in decoder.layers
        ]
        self._cos_Sd = self._sin_Sd = torch.empty(0, self.width)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.dtype

    # -- weights --

    def _matrices(self) -> Iterator[Matrix]:
        yield self.head
        for layer in self.layers:
            yield from (layer.qkv, layer.out, layer.gate_up, layer.down)

    def repack(self) -> None:
        """Make the packed copies anew, after the model's weights were written."""
        for matrix in self._matrices():
            matrix.pack()

    def used(self) -> Iterator[tuple[str, Tensor]]:
        """Name and weight of all matrices, read back from what products are made with; one matrix alive at a time."""
        for matrix in self._matrices():
            yield from matrix.used()

    # -- forward --

    def _tables(self, need: int) -> None:
        """Cosines and signed sines [S, d] of at least so many positions, filled by the model's own rotary module."""
        if len(self._cos_Sd) < need:
            size = max(need, 2 * len(self._cos_Sd), 256)
            like = self.head.weight_NK[:1, :1]
            cos, sin = self.decoder.rotary_emb(like, torch.arange(size, device=like.device)[None])
            # The module turns halves: (x1, x2) -> (-x2, x1). With its sign in the sines that is a flip.
            sign = torch.ones(self.width, device=sin.device, dtype=sin.dtype)
            sign[: self.width // 2] = -1
            self._cos_Sd, self._sin_Sd = cos[0].contiguous(), sin[0] * sign

    def _turning(self, positions_T: Tensor) -> Callable[[Tensor], object]:
        """What turns queries and keys in [T, H + K + K, d] in place, and multiplies queries by the scores' scale."""
        self._tables(int(positions_T.max()) + 1)
        compiled, turned = self.compiled, self.heads + self.key_heads
        if compiled is not None:
            return lambda qkv: compiled.turn_(qkv, self._cos_Sd, self._sin_Sd, positions_T, self.scale)
        scale = self._cos_Sd.new_ones(turned, 1)
        scale[: self.heads] = self.scale
        cos, sin = self._cos_Sd[positions_T][:, None] * scale, self._sin_Sd[positions_T][:, None] * scale

        def turn(qkv: Tensor) -> None:
            qk = qkv[:, :turned]
            torch.addcmul(qk * cos, qk.unflatten(-1, (2, -1)).flip(-2).flatten(-2), sin, out=qk)

        return turn

    def hidden(self, ids_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Hidden states [T, D] before the last norm; `attend` decides who sees whom."""
        turn = self._turning(positions_T)
        x_TD = self.decoder.embed_tokens(ids_T)
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.norm(x_TD)).view(len(ids_T), -1, self.width)
            turn(qkv)
            x_TD = layer.out.plus(attend(index, qkv), x_TD)
            x_TD = layer.down.plus(self._gated(layer.gate_up(layer.mlp_norm(x_TD))), x_TD)
        return x_TD

    def _gated(self, both_TF: Tensor) -> Tensor:
        if self.compiled is not None:
            return self.compiled.gated(both_TF)
        gate, up = both_TF.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, V] in the weights' dtype."""
        return self.head(self.norm(hidden_TD))


class Causal:
    """Attention of whole sequences that lie end to end, each after a prefix that all of them share.

    Args:
        lm: the model.
        lengths: of the sequences, prefix not counted.
        prefix: keys and values [layers, 2, K, S, d] that all sequences see.
        keep: whether to keep keys and values, in `kv` [layers, 2, T, K, d].
    """

    def __init__(self, lm: LlamaLM, lengths: Sequence[int], prefix: Tensor | None = None, keep: bool = False) -> None:
        self.lm, self.prefix = lm, prefix
        ends = torch.tensor(lengths).cumsum(0).tolist()
        self.bounds = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        shape = (len(lm.layers), 2, ends[-1], lm.key_heads, lm.width)
        self.kv = torch.empty(shape, dtype=lm.dtype, device=lm.device) if keep else None
        self._masks: dict[int, Tensor] = {}

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """See `Attend`."""
        q, k, v = qkv.split([self.lm.heads, self.lm.key_heads, self.lm.key_heads], 1)
        if self.kv is not None:
            self.kv[layer, 0], self.kv[layer, 1] = k, v
        out = torch.empty_like(q)
        for start, end in self.bounds:
            query, key, value = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
            mask = None
            if self.prefix is not None:
                past = self.prefix[layer][:, None]
                key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
                mask = self._mask(end - start, key.shape[2])
            seen = F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, scale=1.0, enable_gqa=True
            )
            out[start:end] = seen[0].transpose(0, 1)
        return out.flatten(1)

    def _mask(self, queries: int, keys: int) -> Tensor:
        if queries not in self._masks:
            ones = torch.ones(queries, keys, dtype=torch.bool, device=self.lm.device)
            self._masks[queries] = ones.tril(keys - queries)
        return self._masks[queries]


_PARTS = {
    "": {"embed_tokens", "layers", "norm", "rotary_emb"},
    "layers.0": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "layers.0.self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "layers.0.mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}


@torch.no_grad()
def recognise(model: PreTrainedModel, compiled: bool = True) -> LlamaLM | None:
    """The model for fast decoding, or None if its architecture is another one; says so in the log.

    The weights must be loaded: the first 24 positions are computed both ways and compared.
    """
    reason = _unlike(model)
    if reason is None:
        lm = LlamaLM(model, compiled)
        difference = _difference(lm)
        if difference <= TOLERANCE[lm.dtype]:
            return lm
        reason = f"its logits are off by {difference:.1g} of the largest one"
    _log.info("decoding with transformers' own forward of %s: %s", type(model).__name__, reason)
    return None


def _unlike(model: PreTrainedModel) -> str | None:
    """What of the structure is not Llama's, for the log."""
    decoder: Any = model.get_decoder()
    config: Any = model.config.get_text_config(decoder=True)
    for path, parts in _PARTS.items():
        try:
            found = {name for name, _ in decoder.get_submodule(path).named_children()}
        except AttributeError:
            found = set()
        if found != parts:
            return f"its parts {'of ' + path if path else ''} are not Llama's"
    attention, norms = decoder.layers[0].self_attn, (decoder.norm, decoder.layers[0].input_layernorm)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    biases = {layer.bias is None for layer in (attention.q_proj, attention.k_proj, attention.v_proj)}
    reasons = {
        f"its weights are {model.dtype}": model.dtype not in TOLERANCE,
        "not every layer sees all tokens": kinds != {"full_attention"} or getattr(config, "sliding_window", None),
        "its rotary frequencies depend on the length": decoder.rotary_emb.rope_type in ("dynamic", "longrope"),
        "its head is more than a matrix": getattr(config, "final_logit_softcapping", None)
        or model.get_output_embeddings() is None,
        "its norms are not Llama's": not all(hasattr(norm, "variance_epsilon") for norm in norms),
        "its MLP is not gated by SiLU": config.hidden_act not in ("silu", "swish"),
        "its attention is not Llama's": not hasattr(attention, "head_dim") or len(biases) > 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _difference(lm: LlamaLM) -> float:
    """From the model's own forward, on random tokens (of an own generator: the run's random state stays as it was)."""
    generator = torch.Generator().manual_seed(0)
    size = lm.decoder.embed_tokens.num_embeddings
    ids_T = torch.randint(0, size, (24,), generator=generator).to(lm.device)
    try:
        expected_TV = lm.model(input_ids=ids_T[None], use_cache=False).logits[0].float()
        positions_T = torch.arange(len(ids_T), device=lm.device)
        found_TV = lm.logits(lm.hidden(ids_T, positions_T, Causal(lm, [len(ids_T)]))).float()
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return float("inf")
    difference = float((found_TV - expected_TV).abs().max() / expected_TV.abs().max())
    return difference if difference == difference else float("inf")  # weights that are not numbers say nothing
