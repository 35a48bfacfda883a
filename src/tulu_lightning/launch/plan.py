"""`tulu plan`: memory on each device by part, tokens, steps, time and disk of a run, before anything is loaded."""

import argparse
import json
import shutil
from collections.abc import Sequence
from typing import Any

from tulu_lightning.errors import InputError, nearest
from tulu_lightning.launch.planned import Planned, read_plan
from tulu_lightning.launch.reckoned import DEVICES, MFU, reckon
from tulu_lightning.progress import bytes_text, duration

__all__ = ["known_rows", "main", "parser", "plan_of"]

ROWS = {
    "allenai/tulu-3-sft-mixture": 939_343,
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": 271_409,
    "allenai/llama-3.1-tulu-3-70b-preference-mixture": 334_367,
}
"""Rows of sets on the hub, as it tells them."""


def parser() -> argparse.ArgumentParser:
    """The command line's own options; all others are those of `tulu fit`."""
    found = argparse.ArgumentParser(prog="tulu plan", description=__doc__, add_help=True, allow_abbrev=False)
    found.add_argument(
        "--config", "-c", required=True, metavar="FILE", help="as for tulu fit, whose other options hold too"
    )
    found.add_argument(
        "--device",
        metavar="NAME",
        help=f"{', '.join(DEVICES)}, or cpu (this machine); by default H100 for products in bf16, else cpu",
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
    device = names[options.device.lower()] if options.device else None
    plan, device = plan_of(["--config", options.config, *rest], device, options.rows)
    told = reckon(plan, device, options.tokens_per_row)
    print(json.dumps(told, indent=1) if options.json else _text(told, plan))
    return 0 if told["fits"] else 1


def plan_of(argv: Sequence[str], device: str | None = None, rows: int | None = None) -> tuple[Planned, str]:
    """What a config comes to.

    Args:
        argv: options of `tulu fit`.
        device: one of DEVICES, or "cpu"; None for what the config says.
        rows: of the data, where they cannot be known without reading.

    Returns:
        The plan and the device.

    Raises:
        InputError: as `main`.
    """
    from tulu_lightning.launch.parsed import ParsedFit, processes
    from tulu_lightning.launch.quiet import without_noise

    with without_noise():
        parsed: Any = ParsedFit(["fit", *argv])
    config = parsed.config["fit"]
    device = device or _default_device(config)
    count = processes(config.trainer.accelerator, config.trainer.devices, config.trainer.num_nodes)
    rows = rows or known_rows(config.data.init_args.sources)
    plan = read_plan(config, "cpu" if device == "cpu" else "cuda", count, rows)
    if plan.layout.sharded:
        from tulu_lightning.models.mesh import mesh_sizes

        mesh_sizes(count, plan.layout.tensor_parallel, plan.layout.replicas)  # refuses what does not divide
    return plan, device


def _default_device(config: Any) -> str:
    """A config that names no accelerator is meant for a GPU if its products are bf16."""
    small = config.model.init_args.backbone.compute_dtype == "float32"
    return "cpu" if config.trainer.accelerator == "cpu" or small else "H100"


def known_rows(sources: Any) -> int | None:
    """Rows of a mixture by its settings alone; None where a file or set would have to be read."""
    total = 0.0
    for source in sources:
        settings = source if isinstance(source, dict) else vars(source)
        args = settings.get("args") or {}
        known = [args.get("count"), settings.get("limit")]
        if not settings.get("match") and settings.get("subset") is None:
            known.append(ROWS.get(str(settings.get("hub"))))
        there = min((number for number in known if number), default=None)
        wanted = [number for number in (settings.get("count") or settings.get("cap"), there) if number]
        size = there and there * settings["fraction"] if settings.get("fraction") else min(wanted, default=None)
        if not size:
            return None
        total += size * (settings.get("upsample") or 1)
    return round(total)


# Text -------------------------------------------------------------------------------------------------------------


def _text(told: dict[str, Any], plan: Planned) -> str:
    where = "this machine's CPU" if told["device"] == "cpu" else f"{told['device']} ({bytes_text(told['available'])})"
    lines = [
        f"{told['stage']}, {_count(told['parameters'])} parameters, {_count(told['trained'])} trained, "
        f"on {told['devices']} x {where}",
        "",
        "memory on each device at its highest, packs full:",
    ]
    width = max(len(name) for name in told["memory"])
    for name, size in sorted(told["memory"].items(), key=lambda item: -item[1]):
        lines.append(f"  {name:<{width}}  {bytes_text(size):>9}")
    one = "all processes" if told["device"] == "cpu" and told["devices"] > 1 else "total"
    lines.append(f"  {one:<{width}}  {bytes_text(told['total']):>9} of {bytes_text(told['available'])}")
    lines.append("")
    if told["fits"]:
        lines.append(f"It fits, with {bytes_text(told['available'] - told['total'])} to spare.")
    else:
        lines.append("It does not fit. With each of these on top of the one before:")
        lines += [f"  {e['change']}: {bytes_text(e['total'])} ({e['cost']})" for e in told["would_fit"]]
        if not told["would_fit"] or told["would_fit"][-1]["total"] > told["available"]:
            lines.append("  and it still does not: train adapters (model.backbone.lora.r=16), or a smaller model.")
    return "\n".join([*lines, "", *_course(told, plan)])


def _course(told: dict[str, Any], plan: Planned) -> list[str]:
    """Steps, time and disk."""
    what = "batches of rollouts" if plan.sizes.samples else "steps"
    steps = "?" if told["steps"] is None else f"{told['steps']:,}"
    lines = [f"tokens a step: at most {told['tokens_per_step']:,}; {what}: {steps}"]
    if told["steps"] is None:
        lines.append("  how many rows there are cannot be told without reading them: give --rows")
    if told["seconds_per_step"]:
        low, high = told["seconds_per_step"]
        lines.append(f"time a step: {low:.1f} to {high:.1f} s")
        if told["steps"] is not None:
            lines[-1] += f"; the run {duration(low * told['steps'])} to {duration(high * told['steps'])}"
        length = told["assumed"]["tokens_per_row"]
        lines.append(f"  taken for granted: {MFU[0]:.0%} to {MFU[1]:.0%} of the peak, rows of {length:,} tokens")
    size = {name: bytes_text(many) for name, many in told["disk"].items()}
    free = bytes_text(shutil.disk_usage(".").free)
    kept = f"{size['checkpoint']} a checkpoint, {size['export']} an export"
    return [*lines, f"disk: {kept}, {size['total']} at most at once ({free} are free here)"]


def _count(number: float) -> str:
    return f"{number / 1e9:.4g}B" if number >= 1e9 else f"{number / 1e6:.4g}M"
