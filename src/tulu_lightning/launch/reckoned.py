"""What a planned run takes: memory against a device's, time of a step, disk, and the settings that would make it fit."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from tulu_lightning.core.flops import Shape, Work, training_flops
from tulu_lightning.core.memory import Network, network_bytes
from tulu_lightning.launch.machine import memory_bytes
from tulu_lightning.launch.planned import Planned, peak_parts

__all__ = ["DEVICES", "Device", "disk", "reckon", "remedies", "seconds_per_step", "whole"]


class Device(NamedTuple):
    """A kind of GPU."""

    memory: float
    """Bytes."""
    peak: float
    """FLOP/s of dense bf16 products."""
    bandwidth: float
    """Bytes/s of its memory."""


DEVICES = {
    "H100": Device(80e9, 989e12, 3.35e12),
    "H200": Device(141e9, 989e12, 4.8e12),
    "A100": Device(80e9, 312e12, 2.04e12),
    "A100-40": Device(40e9, 312e12, 1.56e12),
    "4090": Device(24e9, 165e12, 1.01e12),
}
"""From the makers' data sheets: SXM forms, products without sparsity, fp32 sums."""
MFU = (0.30, 0.45)
"""Share of the peak that training is taken to reach: an assumption. SFT of a 1B-shaped Llama reached 0.31 on an H100."""
HELPS = 0.99
"""A change that leaves more than this share of the memory is not worth naming."""
DECODE = 0.6
"""Share of the bandwidth that sampling is taken to reach: an assumption."""


def reckon(plan: Planned, device: str, tokens_per_row: int | None = None) -> dict[str, Any]:
    """Everything that is told of a run, as plain data; sizes in bytes, times in seconds."""
    memory = memory_bytes()[0] if device == "cpu" else DEVICES[device].memory
    parts = peak_parts(plan)
    total = whole(plan)
    return {
        "stage": plan.stage,
        "device": device,
        "devices": plan.layout.devices,
        "parameters": plan.networks["policy"].parameters,
        "trained": plan.networks["policy"].trainable,
        "memory": parts,
        "total": total,
        "available": memory,
        "fits": total <= memory,
        "would_fit": [] if total <= memory else [
            {"change": change, "cost": cost, "total": size} for change, cost, size in remedies(plan, memory)
        ],
        "tokens_per_step": plan.sizes.tokens_per_step,
        "steps": plan.sizes.steps,
        "seconds_per_step": None if device == "cpu" else seconds_per_step(plan, DEVICES[device], tokens_per_row),
        "assumed": {"mfu": MFU, "tokens_per_row": tokens_per_row or plan.sizes.max_tokens + plan.sizes.max_new_tokens},
        "disk": disk(plan),
    }  # fmt: skip


def whole(plan: Planned) -> float:
    """Bytes that are held against the memory: a device's own; of processes on CPUs, which share one, all together."""
    return sum(peak_parts(plan).values()) * (plan.layout.devices if plan.device == "cpu" else 1)


def remedies(plan: Planned, memory: float) -> Iterator[tuple[str, str, float]]:
    """Changes that help, each on top of those before it, until the run fits: (setting, what it costs, bytes then)."""
    before = whole(plan)
    for change, cost, changed in _changes(plan):
        size = whole(changed(plan))
        if size > HELPS * before:
            continue
        plan, before = changed(plan), size
        yield change, cost, size
        if size <= memory:
            return


def _changes(plan: Planned) -> Iterator[tuple[str, str, Any]]:
    if plan.engine_bytes and plan.device == "cuda":
        yield (
            "model.rollout.engine.kind=server",
            "devices of its own for sampling; model.rollout.engines=one then",
            lambda p: replace(p, engine_bytes=0, engine_cache=0.0),
        )
    if plan.recompute != "layers":
        yield (
            "model.backbone.activation_checkpointing=true",
            "a forward pass more: about a third of the time",
            lambda p: replace(p, recompute="layers"),
        )
    sizes, key = plan.sizes, "model" if plan.sizes.samples else "data"
    least = sizes.max_tokens + sizes.max_new_tokens if sizes.samples else sizes.max_tokens * sizes.sides
    if sizes.micro_tokens > least:
        yield (
            f"{key}.micro_tokens={least}",
            "smaller products",
            lambda p: replace(p, sizes=replace(p.sizes, micro_tokens=least)),
        )
    for name, key in (("policy", "model.optimizer"), ("critic", "model.critic.optimizer")):
        if name in plan.networks and plan.networks[name].state_bits == 32:
            yield (
                f"{key}.state_bits=8",
                "moments in 8 bits: steps that are slightly others",
                lambda p, name=name: _with(p, name, p.networks[name]._replace(state_bits=8)),
            )
    if not plan.layout.sharded:
        yield (
            "trainer.strategy=fsdp2",
            "gathering of weights",
            lambda p: replace(p, layout=replace(p.layout, sharded=True)),
        )
    if plan.device == "cuda" and not plan.layout.cpu_offload:  # a CPU has nowhere to offload to
        yield (
            f"trainer.strategy='{_offloaded(plan)}'",
            "weights travel over the bus in each pass, and the update runs on the CPU",
            lambda p: replace(p, layout=replace(p.layout, cpu_offload=True, sharded=True)),
        )
    count = plan.layout.devices
    for factor in (2, 4, 8, 16, 32):
        yield (
            f"{count * factor} devices",
            "more machines",
            lambda p, factor=factor: replace(p, layout=replace(p.layout, devices=count * factor, sharded=True)),
        )


def _with(plan: Planned, name: str, network: Network) -> Planned:
    return replace(plan, networks={**plan.networks, name: network})


def _offloaded(plan: Planned) -> str:
    """The strategy as one option: its short name `fsdp2` takes no settings."""
    sizes = {"tensor_parallel": plan.layout.tensor_parallel, "replicas": plan.layout.replicas}
    settings = {**{name: size for name, size in sizes.items() if size > 1}, "cpu_offload": True}
    return json.dumps({"class_path": "tulu_lightning.models.sharding.Fsdp2", "init_args": settings})


def seconds_per_step(plan: Planned, device: Device, tokens_per_row: int | None) -> tuple[float, float]:
    """From the best to the worst MFU that is assumed, at most `max_tokens` a row."""
    sizes = plan.sizes
    length = tokens_per_row or sizes.max_tokens + sizes.max_new_tokens
    documents = sizes.examples_per_step * max(sizes.samples, sizes.sides)
    work = Work(documents * length, documents * length, documents * length * (length + 1) // 2)
    flops = 0.0
    for name, network in plan.networks.items():
        arch = network.arch
        whole = network.trained and not network.lora
        head = 0 if network.scalar_head else arch.head
        shape = Shape(
            arch.matrices, arch.matrices if whole else 0, head, bool(head) and whole, arch.query * arch.layers
        )
        once = training_flops(shape, work)
        if not network.trained:
            flops += (2 * (arch.matrices + arch.head)) * work.tokens
            continue
        flops += once * (4 / 3 if plan.recompute == "layers" else 1) * sizes.passes
        if sizes.samples and name in ("policy", "critic"):
            flops += once / 3  # log-probs or values before the first epoch
    fastest, slowest = (flops / (device.peak * plan.layout.devices * mfu) for mfu in reversed(MFU))
    sampling = 0.0
    if sizes.samples:
        arch = plan.networks["policy"].arch
        engines = max(1, plan.layout.data_parallel)
        rows = -(-sizes.examples_per_step * sizes.samples // engines)
        per_token = 2 * arch.parameters + rows * 2 * arch.layers * arch.kv * 2 * (
            sizes.max_tokens + sizes.max_new_tokens / 2
        )
        sampling = sizes.max_new_tokens * per_token / (device.bandwidth * DECODE)
    return fastest + sampling, slowest + sampling


def disk(plan: Planned) -> dict[str, float]:
    """Bytes of one checkpoint, of all that lie there at once (one is being written), and of an export."""
    one = 0.0
    for network in plan.networks.values():
        if network.trained:
            parts = network_bytes(network)
            whole = parts["weights"] if not network.four_bits else network.trainable * 4
            one += whole + parts["optimizer"]
    policy = plan.networks["policy"]
    one += policy.parameters * policy.weight_bytes * plan.engine_saved
    export = float(policy.parameters * (2 if policy.weight_bytes == 2 and not policy.lora else 4))
    return {"checkpoint": one, "export": export, "total": one * (plan.keep + 1) + export if plan.keep else export}
