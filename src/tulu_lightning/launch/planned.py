"""From a parsed config to networks, passes and counts: what `tulu plan` reckons with."""

from dataclasses import dataclass, replace
from typing import Any

from tulu_lightning.core.kl import Kl
from tulu_lightning.core.memory import (
    Architecture,
    Network,
    Pass,
    cache_bytes,
    gathered_bytes,
    network_bytes,
    pass_bytes,
)
from tulu_lightning.models.architectures import find_architecture
from tulu_lightning.rollout.engines import check_shared

__all__ = ["Layout", "Planned", "Sizes", "peak_parts", "read_plan"]

GPU_CONTEXT = 1.5e9
"""CUDA's context, NCCL's buffers and cuBLAS' workspace on one device, about."""
FRAGMENTS = 0.03
"""Share of the rest that PyTorch's allocator on a GPU holds beyond what is in use, about."""


@dataclass(frozen=True)
class Layout:
    """How a run lies on its devices."""

    devices: int = 1
    sharded: bool = False
    tensor_parallel: int = 1
    replicas: int = 1
    cpu_offload: bool = False

    @property
    def shards(self) -> int:
        """Devices that share one copy of a network."""
        return max(1, self.devices // self.replicas) if self.sharded else 1

    @property
    def data_parallel(self) -> int:
        """Devices that get rows of their own."""
        return self.devices // self.tensor_parallel


@dataclass(frozen=True)
class Sizes:
    """What of a run is counted in tokens and rows."""

    micro_tokens: int
    max_tokens: int
    examples_per_step: int
    scored: int | None = None
    """Tokens of a pass that get a log-prob; None for all."""
    sides: int = 1
    """Documents of one example that have `max_tokens` each: 2 for a pair."""
    samples: int = 0
    """Of PPO: responses of a prompt."""
    max_new_tokens: int = 0
    epochs: int = 1
    """Of the data."""
    passes: int = 1
    """Of PPO, over a batch of rollouts."""
    rows: int | None = None
    """Of the data; None where it is not known without reading them."""
    max_steps: int | None = None

    @property
    def tokens_per_step(self) -> int:
        """At most, all devices together."""
        if self.samples:
            return self.examples_per_step * self.samples * (self.max_tokens + self.max_new_tokens)
        return self.examples_per_step * self.max_tokens * self.sides

    @property
    def steps(self) -> int | None:
        """Optimiser steps (of PPO: batches of rollouts) of the run."""
        if self.max_steps is not None:
            return self.max_steps
        if self.rows is None:
            return None
        return -(-self.rows // self.examples_per_step) * self.epochs  # each epoch's last step may be short


@dataclass(frozen=True)
class Planned:
    """A run, as far as memory and time go."""

    stage: str
    networks: dict[str, Network]
    """policy; critic, reference and engine where there are any."""
    compute_bytes: int
    recompute: str
    layout: Layout
    sizes: Sizes
    device: str
    """"cpu" or "cuda"."""
    engine_bytes: int = 0
    """Of a weight of the sampler's copy; 0 without one in the trainer's processes."""
    engine_cache: float = 0.0
    """Bytes that the sampler has for keys and values."""
    engine_stays: bool = False
    """Whether it holds them through training too, as vLLM does; the engine of this package takes them anew each time."""
    engine_saved: bool = False
    """Whether checkpoints hold its weights, which may be older than the policy's."""
    keep: int = 1
    """Checkpoints that stay."""

    def passes(self) -> dict[str, Pass]:
        """The passes whose moments may be the highest, by network."""
        this = Pass(
            self.sizes.micro_tokens,
            self.sizes.micro_tokens if self.sizes.scored is None else self.sizes.scored,
            self.compute_bytes,
            self.recompute,
            self.device,
            self.layout.tensor_parallel,
            self.compute_bytes if self.layout.sharded else 4,
            self.device == "cpu" and not self.layout.sharded,
        )
        return dict.fromkeys(self.networks, this)


def peak_parts(plan: Planned) -> dict[str, float]:
    """Bytes on one device by part, at the highest moment of a step: of a pass with a gradient, or of sampling."""
    training, sampling = _kept(plan, gradients=True) | _pass(plan), _kept(plan, gradients=False)
    if plan.engine_bytes:
        engine = float((plan.networks["policy"].arch.parameters + _packed(plan)) * plan.engine_bytes)
        training["engine weights"] = sampling["engine weights"] = engine
        sampling["KV cache"] = plan.engine_cache
        if plan.engine_stays:
            training["KV cache"] = plan.engine_cache
    parts = max(training, sampling, key=lambda each: sum(each.values()))
    if plan.device == "cuda":
        parts["context and allocator"] = GPU_CONTEXT + FRAGMENTS * sum(parts.values())
    return {name: size for name, size in parts.items() if size}


def _packed(plan: Planned) -> int:
    """Weights that the engine of this package holds twice: on a CPU, as a matrix and as products want them."""
    arch = plan.networks["policy"].arch
    return 0 if plan.device == "cuda" or plan.engine_stays else arch.matrices + arch.head


def _kept(plan: Planned, gradients: bool) -> dict[str, float]:
    """What stays through a step, weights, optimiser states and gradients, those of the networks beside the policy by name."""
    parts: dict[str, float] = {}
    for name, network in plan.networks.items():
        for part, size in network_bytes(network, plan.layout.shards).items():
            if plan.layout.cpu_offload or (part == "gradients" and not gradients):
                continue
            label = part if name == "policy" else name
            parts[label] = parts.get(label, 0.0) + size
    return parts


def _pass(plan: Planned) -> dict[str, float]:
    """What the largest pass adds."""
    moments = {name: pass_bytes(plan.networks[name], this) for name, this in plan.passes().items()}
    parts = max(moments.values(), key=lambda each: sum(each.values()))
    if plan.layout.sharded and (plan.layout.shards > 1 or plan.layout.cpu_offload):
        parts["gathered"] = max(
            gathered_bytes(network, plan.compute_bytes, plan.layout.tensor_parallel)
            for network in plan.networks.values()
        )
    return parts


# Reading a config -----------------------------------------------------------------------------------------------------


def read_plan(config: Any, device: str, devices: int, rows: int | None) -> Planned:
    """What a parsed config of `tulu fit` comes to.

    Args:
        config: with `model`, `data` and `trainer`.
        device: "cpu" or "cuda".
        devices: in all.
        rows: of the data, where it is known.

    Raises:
        InputError: the model's shapes are not known, or its vLLM would not start.
    """
    kind = config.model.class_path.rpartition(".")[2]
    model, data = config.model.init_args, config.data.init_args
    policy = _network(model.backbone, getattr(model, "optimizer", None), scalar=kind == "RewardModel")
    networks, engine_bytes, engine_cache = {"policy": policy}, 0, 0.0
    if kind == "PPO":
        if "GAE" in str(_get(model, "advantage", "class_path") or "GAE"):
            path = _get(model, "critic", "path") or model.backbone.path
            own, arch = _network(model.backbone, _get(model, "critic", "optimizer"), True), find_architecture(path)
            layers = _get(model, "critic", "layers") or arch.layers
            networks["critic"] = own._replace(arch=arch._replace(layers=layers))
        if (model.kl or Kl()).coefficient > 0 and not policy.lora:  # left out, it is the paper's
            networks["reference"] = policy._replace(trained=False)
        check_shared(model.rollout.engine, device == "cuda")
        engine_bytes, engine_cache = _engine(model, policy.arch, data)
    live = "live" in (_get(model, "reference"), _get(model, "reference", "mode"))
    if kind == "DPO" and live and not policy.lora:
        networks["reference"] = policy._replace(trained=False)
    low, backbone = model.backbone.compute_dtype == "bfloat16", model.backbone
    recompute = {"layers": backbone.activation_checkpointing, "mlps": backbone.recompute_mlps, "none": True}
    return Planned(
        stage=kind,
        networks=networks,
        compute_bytes=2 if low else 4,
        recompute=next(kind for kind, is_on in recompute.items() if is_on),
        layout=_layout(config.trainer, devices),
        sizes=_sizes(kind, model, data, rows),
        device=device,
        engine_bytes=engine_bytes,
        engine_cache=engine_cache,
        engine_stays=kind == "PPO" and model.rollout.engine.kind == "vllm",
        engine_saved=kind == "PPO" and _setting(config.trainer.callbacks, "RolloutRefresh", "every_n_steps", 1) > 1,
        keep=_setting(config.trainer.callbacks, "Checkpoints", "keep", 0),
    )


def _get(value: Any, *names: str) -> Any:
    """A nested value, where every level may be missing."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
        if value is None:
            return None
    return value


def _network(backbone: Any, optimizer: Any, scalar: bool) -> Network:
    arch = find_architecture(backbone.path)
    if backbone.layers:
        arch = arch._replace(layers=backbone.layers)
    four = 0.0
    if backbone.quantize:
        blocks = 1 / backbone.quantize.blocksize
        four = 0.5 + blocks * (1 + 4 / 256 if backbone.quantize.double_quant else 4)
    return Network(
        arch,
        scalar_head=scalar,
        lora=backbone.lora.r if backbone.lora else 0,
        targets=tuple(backbone.lora.targets) if backbone.lora and backbone.lora.targets else None,
        four_bits=four,
        weight_bytes=2 if backbone.weights_dtype == "bfloat16" else 4,
        state_bits=_get(optimizer, "state_bits") or 32,
    )


def _engine(model: Any, arch: Architecture, data: Any) -> tuple[int, float]:
    rollout = model.rollout
    engine = rollout.engine
    if engine.kind == "server":
        return 0, 0.0  # it has a device of its own
    value = 2 if engine.dtype == "bfloat16" else 4
    if engine.kind == "vllm":
        return value, (engine.kv_cache_mb or 1024) * 2.0**20  # what it has on a CPU if it is not told
    tokens = min(
        16384, data.examples_per_step * rollout.samples_per_prompt * (data.max_tokens + rollout.max_new_tokens)
    )
    return value, cache_bytes(arch, tokens, value)


def _layout(trainer: Any, devices: int) -> Layout:
    strategy = trainer.strategy
    named = strategy if isinstance(strategy, str) else str(_get(strategy, "class_path") or "")
    sharded = named == "fsdp2" or named.endswith(".Fsdp2")
    args = None if isinstance(strategy, str) else _get(strategy, "init_args")
    return Layout(
        devices,
        sharded,
        int(_get(args, "tensor_parallel") or 1),
        int(_get(args, "replicas") or 1),
        bool(_get(args, "cpu_offload") or False),
    )


def _sizes(kind: str, model: Any, data: Any, rows: int | None) -> Sizes:
    shared = Sizes(
        micro_tokens=getattr(data, "micro_tokens", None) or data.max_tokens,
        max_tokens=data.max_tokens,
        examples_per_step=data.examples_per_step,
        sides=2 if kind in ("DPO", "RewardModel") else 1,
        epochs=data.epochs,
        rows=rows,
        max_steps=data.max_steps,
    )
    if kind != "PPO":
        return shared
    return replace(
        shared,
        micro_tokens=model.micro_tokens,
        samples=model.rollout.samples_per_prompt,
        max_new_tokens=model.rollout.max_new_tokens,
        passes=model.epochs,
    )


def _setting(callbacks: list[Any] | None, kind: str, name: str, without: int) -> int:
    found = (each for each in callbacks or [] if str(_get(each, "class_path")).endswith(f".{kind}"))
    return next((int(_get(each, "init_args", name) or 1) for each in found), without)
