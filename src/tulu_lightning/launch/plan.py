"""`tulu plan`: memory on each device by part, tokens, steps, time and disk of a run, before anything is loaded."""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tulu_lightning.errors import InputError, nearest

__all__ = ["DEVICES", "Device", "main", "parser", "remedies"]


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
"""Share of the peak that training is taken to reach: an assumption, measured on no GPU yet."""
DECODE = 0.6
"""Share of the bandwidth that sampling is taken to reach: an assumption."""
ROWS = {
    "allenai/tulu-3-sft-mixture": 939_343,
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": 271_409,
    "allenai/llama-3.1-tulu-3-70b-preference-mixture": 334_367,
}
"""Rows of sets on the hub, as it tells them."""
GB = 1e9


def parser() -> argparse.ArgumentParser:
    """The command line's own options; all others are those of `tulu fit`."""
    found = argparse.ArgumentParser(prog="tulu plan", description=__doc__, add_help=True, allow_abbrev=False)
    found.add_argument(
        "--config", "-c", required=True, metavar="FILE", help="as for tulu fit, whose other options hold too"
    )
    found.add_argument(
        "--device",
        metavar="NAME",
        help=f"{', '.join(DEVICES)}, or cpu (this machine); cpu where the config says so, else H100",
    )
    found.add_argument(
        "--rows", type=int, metavar="N", help="rows of the data, where they cannot be known without reading"
    )
    found.add_argument(
        "--tokens_per_row", type=int, metavar="N", help="mean length, for the time; max_tokens by default"
    )
    found.add_argument("--json", action="store_true", help="print everything as JSON")
    return found


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments.

    Returns:
        Exit status: 0 if the run fits, 1 if not.

    Raises:
        InputError: what `tulu fit` would refuse in the config, an unknown device, a model whose shapes are not known.
    """
    options, rest = parser().parse_known_args(list(argv))
    names = {name.lower(): name for name in [*DEVICES, "cpu"]}
    if options.device is not None and options.device.lower() not in names:
        raise InputError("--device", f"is {options.device!r}", nearest(options.device, names.values()))
    for name in ("rows", "tokens_per_row"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name}", f"is {getattr(options, name)}", "Use at least 1.")
    from tulu_lightning.launch.parsed import ParsedFit, processes
    from tulu_lightning.launch.planned import read_plan
    from tulu_lightning.launch.quiet import without_noise

    with without_noise():
        parsed: Any = ParsedFit(["fit", "--config", options.config, *rest])
    config = parsed.config["fit"]
    device = names[options.device.lower()] if options.device else _default_device(config.trainer)
    count = processes(config.trainer.accelerator, config.trainer.devices, config.trainer.num_nodes)
    rows = options.rows or known_rows(config.data.init_args.sources)
    plan = read_plan(config, "cpu" if device == "cpu" else "cuda", count, rows)
    told = reckon(plan, device, options.tokens_per_row)
    print(json.dumps(told, indent=1) if options.json else _text(told, plan))
    return 0 if told["fits"] else 1


def _default_device(trainer: Any) -> str:
    return "cpu" if trainer.accelerator == "cpu" or trainer.strategy == "auto" else "H100"


def known_rows(sources: Any) -> int | None:
    """Rows of a mixture by its settings alone; None where a file or set would have to be read."""
    total = 0.0
    for source in sources:
        settings = source if isinstance(source, dict) else vars(source)
        args = settings.get("args") or {}
        size = settings.get("count") or settings.get("cap") or settings.get("limit") or args.get("count")
        if not size and not settings.get("match") and settings.get("subset") is None:
            size = ROWS.get(str(settings.get("hub")))
            size = size and size * (settings.get("fraction") or 1)
        if not size:
            return None
        total += size * (settings.get("upsample") or 1)
    return round(total)


# Reckoning --------------------------------------------------------------------------------------------------------


def reckon(plan: Any, device: str, tokens_per_row: int | None = None) -> dict[str, Any]:
    """Everything that is told of a run, as plain data; sizes in bytes, times in seconds."""
    from tulu_lightning.launch.planned import peak_parts

    memory = _cpu_memory() if device == "cpu" else DEVICES[device].memory
    parts = peak_parts(plan)
    total = sum(parts.values()) * (plan.layout.devices if device == "cpu" else 1)
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
        "assumed": {"mfu": MFU, "tokens_per_row": tokens_per_row or plan.sizes.max_tokens},
        "disk": disk(plan),
    }  # fmt: skip


def remedies(plan: Any, memory: float) -> Iterator[tuple[str, str, float]]:
    """Changes, each on top of those before it, until the run fits: (setting, what it costs, bytes then)."""
    from tulu_lightning.launch.planned import peak_parts

    for change, cost, changed in _changes(plan):
        plan = changed(plan)
        size = sum(peak_parts(plan).values())
        yield change, cost, size
        if size <= memory:
            return


def _changes(plan: Any) -> Iterator[tuple[str, str, Any]]:
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
    if any(network.trained and network.state_bits == 32 for network in plan.networks.values()):
        yield (
            "model.optimizer.state_bits=8",
            "moments in 8 bits: steps that are slightly others",
            lambda p: replace(p, networks={n: w._replace(state_bits=8) for n, w in p.networks.items()}),
        )
    if plan.layout.sharded and not plan.layout.cpu_offload:
        yield (
            "trainer.strategy.init_args.cpu_offload=true",
            "weights travel over the bus in each pass, and the update runs on the CPU",
            lambda p: replace(p, layout=replace(p.layout, cpu_offload=True)),
        )
    else:
        yield (
            "trainer.strategy=fsdp2",
            "gathering of weights",
            lambda p: replace(p, layout=replace(p.layout, sharded=True)),
        )
    count = plan.layout.devices
    for factor in (2, 4, 8, 16, 32):
        yield (
            f"{count * factor} devices",
            "more machines",
            lambda p, factor=factor: replace(p, layout=replace(p.layout, devices=count * factor, sharded=True)),
        )


def seconds_per_step(plan: Any, device: Device, tokens_per_row: int | None) -> tuple[float, float]:
    """From the best to the worst MFU that is assumed, at most `max_tokens` a row."""
    from tulu_lightning.core.flops import Shape, Work, training_flops

    sizes = plan.sizes
    if tokens_per_row is None:
        length = sizes.max_tokens + sizes.max_new_tokens
    else:
        length = tokens_per_row
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
        flops += once * (4 / 3 if plan.recompute == "layers" else 1) * (sizes.epochs if sizes.samples else 1)
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


def disk(plan: Any) -> dict[str, float]:
    """Bytes of one checkpoint, of all that lie there at once (one is being written), and of an export."""
    from tulu_lightning.core.memory import network_bytes

    one = 0.0
    for network in plan.networks.values():
        if network.trained:
            parts = network_bytes(network)
            whole = parts["weights"] if not network.four_bits else network.trainable * 4
            one += whole + parts["optimizer"]
    policy = plan.networks["policy"]
    export = float(policy.parameters * (2 if policy.weight_bytes == 2 and not policy.lora else 4))
    return {"checkpoint": one, "export": export, "total": one * (plan.keep + 1) + export if plan.keep else export}


def _cpu_memory() -> float:
    import os

    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


# Text -------------------------------------------------------------------------------------------------------------


def _text(told: dict[str, Any], plan: Any) -> str:
    from tulu_lightning.progress import duration

    where = "this machine's CPU" if told["device"] == "cpu" else f"{told['device']} ({told['available'] / GB:.0f} GB)"
    lines = [
        f"{told['stage']}, {told['parameters'] / 1e9:.2f}B parameters, {told['trained'] / 1e9:.3g}B trained, "
        f"on {told['devices']} x {where}",
        "",
        "memory on each device at its highest, packs full:",
    ]
    width = max(len(name) for name in told["memory"])
    for name, size in sorted(told["memory"].items(), key=lambda item: -item[1]):
        lines.append(f"  {name:<{width}}  {size / GB:9.2f} GB")
    one = "all processes" if told["device"] == "cpu" and told["devices"] > 1 else "total"
    lines.append(f"  {one:<{width}}  {told['total'] / GB:9.2f} GB of {told['available'] / GB:.1f}")
    lines.append("")
    if told["fits"]:
        lines.append(f"It fits, with {(told['available'] - told['total']) / GB:.1f} GB to spare.")
    else:
        lines.append("It does not fit. With each of these on top of the one before:")
        lines += [f"  {e['change']}: {e['total'] / GB:.1f} GB ({e['cost']})" for e in told["would_fit"]]
        if not told["would_fit"] or told["would_fit"][-1]["total"] > told["available"]:
            lines.append("  and it still does not: train adapters (model.backbone.lora.r=16), or a smaller model.")
    lines.append("")
    what = "batches of rollouts" if plan.sizes.samples else "steps"
    steps = "?" if told["steps"] is None else f"{told['steps']:,}"
    lines.append(f"tokens a step: at most {told['tokens_per_step']:,}; {what}: {steps}")
    if told["steps"] is None:
        lines.append("  how many rows there are cannot be told without reading them: give --rows")
    if told["seconds_per_step"]:
        low, high = told["seconds_per_step"]
        run = (
            ""
            if told["steps"] is None
            else f"; the run {duration(low * told['steps'])} to {duration(high * told['steps'])}"
        )
        lines.append(f"time a step: {low:.1f} to {high:.1f} s{run}")
        lines.append(
            f"  taken for granted: {MFU[0]:.0%} to {MFU[1]:.0%} of the peak, rows of {told['assumed']['tokens_per_row']:,} tokens"
        )
    size = told["disk"]
    lines.append(
        f"disk: {size['checkpoint'] / GB:.1f} GB a checkpoint, {size['export'] / GB:.1f} GB an export, "
        f"{size['total'] / GB:.1f} GB at most at once"
    )
    if free := _free(plan):
        lines[-1] += f" ({free / GB:.0f} GB are free here)"
    return "\n".join(lines)


def _free(plan: Any) -> float:
    return float(shutil.disk_usage(".").free)
