"""How much memory a training step needs, by part, from shapes alone: pure arithmetic, in bytes.

What a layer keeps for its backward was counted on this package's own layers (`benchmarks/memory.py` counts again): in
fp32 the four widths of its two norms and residuals, queries and attention's output, keys and values, and the two halves
of the gated MLP; with bf16 products the same in 2 bytes, but for the residual stream.
"""

from collections.abc import Collection
from typing import NamedTuple

__all__ = [
    "Architecture",
    "Network",
    "Pass",
    "activation_bytes",
    "cache_bytes",
    "gathered_bytes",
    "network_bytes",
    "pass_bytes",
]

FP32 = 4
ADAM_8BIT = 2 * (1 + FP32 / 256)
"""Two moments of one byte, and a scale for each 256 of them (torchao)."""
NF4_CODE = 0.5
MLP = ("gate_proj", "up_proj", "down_proj")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP)
"""A decoder layer's linear layers, as Llama calls them."""
LOSS_CHUNK = {"cpu": 64 << 20, "cuda": 256 << 20}
"""Logits alive at once (`core.nll`)."""
LOGIT_COPIES = 2
"""Of a chunk: the logits and what becomes of them."""


class Architecture(NamedTuple):
    """Shapes of a Llama-like decoder."""

    width: int
    mlp: int
    layers: int
    query: int
    """Width of the queries, all heads together."""
    kv: int
    """Width of the keys, all heads together; values have the same."""
    vocabulary: int
    tied: bool

    @property
    def layer_matrices(self) -> int:
        """Weights of the linear layers of one decoder layer."""
        return 2 * self.width * (self.query + self.kv) + 3 * self.width * self.mlp

    @property
    def matrices(self) -> int:
        """Weights of all decoder layers' linear layers."""
        return self.layers * self.layer_matrices

    @property
    def head(self) -> int:
        """Weights of the embedding, and of the output head if it is another."""
        return self.vocabulary * self.width

    @property
    def decoder(self) -> int:
        """Parameters of layers, norms and embedding."""
        return self.matrices + (2 * self.layers + 1) * self.width + self.head

    @property
    def parameters(self) -> int:
        """All of a causal language model.

        Example: Llama 3.1 8B has 8,030,261,248.
        """
        return self.decoder + (0 if self.tied else self.head)

    def adapters(self, rank: int, targets: Collection[str] | None = None) -> int:
        """Parameters of LoRA on the linear layers of these names, as Llama calls them; None is every one."""
        query, kv, mlp = (self.width + end for end in (self.query, self.kv, self.mlp))
        ends = dict(zip(LINEAR, (query, kv, kv, query, mlp, mlp, mlp), strict=True))
        return self.layers * rank * sum(end for name, end in ends.items() if targets is None or name in targets)


class Network(NamedTuple):
    """One network on a device, as it is kept between steps."""

    arch: Architecture
    trained: bool = True
    scalar_head: bool = False
    """A reward model or critic: no output head."""
    lora: int = 0
    """Rank; 0 trains all."""
    targets: tuple[str, ...] | None = None
    """Names of the layers that have adapters; None is every linear one."""
    four_bits: float = 0.0
    """Bytes of a matrix's weight in 4 bits, scales included; 0 for none."""
    weight_bytes: int = FP32
    state_bits: int = 32
    """Of each of Adam's moments."""

    @property
    def parameters(self) -> int:
        """Of the model, without adapters."""
        return self.arch.decoder + self.arch.width if self.scalar_head else self.arch.parameters

    @property
    def trainable(self) -> int:
        """Parameters that get a gradient."""
        if not self.trained:
            return 0
        if not self.lora:
            return self.parameters
        return self.arch.adapters(self.lora, self.targets) + (self.arch.width if self.scalar_head else 0)


def network_bytes(network: Network, shards: int = 1) -> dict[str, float]:
    """Weights, gradients and optimiser states of a network on one of `shards` devices.

    Example: 8B in fp32 with Adam is 16 bytes a parameter: 128.5 GB on one device, 4.0 GB on each of 32.
    """
    arch, quantised = network.arch, network.arch.matrices if network.four_bits else 0
    weights = (network.parameters - quantised) * network.weight_bytes + quantised * network.four_bits
    if network.lora and network.trained:
        weights += arch.adapters(network.lora, network.targets) * FP32
    trained = network.trainable
    gradient = FP32 if network.lora else network.weight_bytes
    moments = 2 * gradient if network.state_bits == 32 else ADAM_8BIT  # torch keeps them as the weights are
    parts = {"weights": weights, "gradients": trained * gradient, "optimizer": trained * moments}
    return {name: value / shards for name, value in parts.items()}


class Pass(NamedTuple):
    """One micro-batch on one device."""

    tokens: int
    """On its token axis."""
    scored: int
    """Tokens that get a log-prob."""
    compute_bytes: int = FP32
    """Of the matrix products' operands."""
    recompute: str = "none"
    """"layers" (activation checkpointing), "mlps", or "none"."""
    device: str = "cpu"
    tensor_parallel: int = 1
    residual_bytes: int = FP32
    """Of the stream between layers: fp32 under autocast, the lower dtype under FSDP2's policy."""
    in_place: bool = False
    """Whether the head's gradient is added where it is made (`core.gradients`): unsharded, on a CPU."""


def activation_bytes(network: Network, this: Pass) -> float:
    """What forward keeps for backward, over all layers (of the widest moment of recomputed layers, too)."""
    if not network.trained:  # a pass without a gradient keeps one layer at a time
        return this.tokens * _layer_bytes(network, this, keep_mlp=True)
    arch = network.arch
    ends = (
        this.tokens * arch.width * (this.residual_bytes + this.compute_bytes)
    )  # into the last norm, and the scored states
    if this.recompute == "layers":
        one = _layer_bytes(network, this, keep_mlp=True) + _backward_bytes(arch, this)
        return ends + this.tokens * (arch.layers * arch.width * this.residual_bytes + one)
    kept = _layer_bytes(network, this, keep_mlp=this.recompute != "mlps")
    once = _layer_bytes(network, this, keep_mlp=True) - kept
    # A layer's backward holds gradients of its own widest parts beside what is kept.
    return ends + this.tokens * (arch.layers * kept + once + _backward_bytes(arch, this))


def _layer_bytes(network: Network, this: Pass, keep_mlp: bool) -> float:
    arch, c, tp = network.arch, this.compute_bytes, this.tensor_parallel
    low = c < FP32
    residual = 2 * arch.width * this.residual_bytes
    normed = 2 * arch.width * c
    attention = (2 * arch.query + 2 * arch.kv) * c / tp
    mlp = 2 * arch.mlp * c / tp if keep_mlp else 0.0
    if network.lora:  # adapters take the MLP apart: gate times up is kept too, and A's outputs
        names = {*(network.targets or LINEAR)}
        mlp += (2 if low else 1) * arch.mlp * c / tp * bool(names & {*MLP}) + len(names) * network.lora * FP32
        normed += 4 * arch.width * c if low else 0
    return residual + normed + attention + mlp + 2 * FP32


def _backward_bytes(arch: Architecture, this: Pass) -> float:
    """Gradients alive within a layer's backward: of both halves of the MLP and their product, of the residual twice."""
    return (3 * arch.mlp / this.tensor_parallel + 2 * arch.width) * this.compute_bytes


def pass_bytes(network: Network, this: Pass) -> dict[str, float]:
    """Activations and the loss of one pass.

    The loss holds a chunk of logits, and where the head trains its whole gradient beside the one that is summed up, unless
    it is added in place (which takes fp32 weights).
    """
    arch = network.arch
    parts = {"activations": activation_bytes(network, this)}
    if network.four_bits:  # the two widest matrices are alive at once
        parts["unquantised"] = 2 * arch.width * arch.mlp * this.compute_bytes / this.tensor_parallel
    if network.scalar_head:
        return parts
    logits = min(this.scored * arch.vocabulary * FP32, LOSS_CHUNK[this.device]) * LOGIT_COPIES
    beside = network.trained and not network.lora and not (this.in_place and network.weight_bytes == FP32)
    parts["loss"] = logits + (arch.head * FP32 if beside else 0)
    if this.compute_bytes < FP32:
        parts["loss"] += arch.head * this.compute_bytes  # the head's weights in the lower dtype
    return parts


def gathered_bytes(network: Network, compute_bytes: int, tensor_parallel: int = 1) -> float:
    """What FSDP2 has gathered at once on a device: embedding and head, two layers, and a layer's whole gradient.

    Tensor parallelism splits the layers; embedding and head are whole on every device.
    """
    arch = network.arch
    root = (1 if arch.tied or network.scalar_head else 2) * arch.head * compute_bytes
    layer = arch.layer_matrices * (network.four_bits or compute_bytes)
    gradient = arch.layer_matrices * FP32 if network.trained and not network.lora else 0
    return root + (2 * layer + gradient) / tensor_parallel


def cache_bytes(arch: Architecture, tokens: int, value_bytes: int = 2) -> float:
    """Keys and values of so many tokens, over all layers."""
    return 2.0 * arch.layers * arch.kv * value_bytes * tokens
