"""What torch sees: devices, and the attention and loss kernels that a run would take on each."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tulu_lightning.launch.findings import Finding, failed_import
from tulu_lightning.launch.machine import GIB

__all__ = ["look"]

PART, KERNELS = "devices", "kernels"
INSTALL = "Install torch again; on a GPU, the build for your CUDA version (https://pytorch.org)."


def look() -> Iterator[Finding]:
    """Findings on torch and its devices, and the kernels of each. torch is imported here."""
    try:
        import torch
    except Exception as error:  # whatever a broken installation raises
        yield failed_import(PART, "torch", error, INSTALL)
        yield Finding(KERNELS, "attention", "off", "because torch does not import")
        return
    yield _build(torch)
    gpus = _gpus(torch)
    yield from gpus
    yield from _kernels(torch, "cuda" if gpus and gpus[0].state != "off" else "cpu")


def _build(torch: Any) -> Finding:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if getattr(torch.version, "hip", None):
        build = f"ROCm {torch.version.hip}"
    threads = f"{torch.get_num_threads()} threads"
    text = f"{torch.__version__} ({build}), CPU kernels {torch.backends.cpu.get_cpu_capability()}, {threads}"
    return Finding(PART, "torch", "ok", text)


def _gpus(torch: Any) -> list[Finding]:
    driver = _driver()
    if not torch.cuda.is_available():
        if not driver:
            return [Finding(PART, "gpu", "off", "because there is none that torch sees; runs take the CPU")]
        why = "this build of torch has no CUDA" if not torch.version.cuda else "torch cannot use it (driver too old?)"
        text = f"because {why}, though a driver is there ({driver}); runs take the CPU"
        return [Finding(PART, "gpu", "off", text, INSTALL)]
    found = []
    for index in range(torch.cuda.device_count()):
        try:
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
        except Exception as error:  # one that is there and fails
            reason = (str(error).splitlines() or [""])[0]
            found.append(Finding(PART, f"gpu {index}", "warn", f"it does not answer ({reason})", "Look at nvidia-smi."))
            continue
        capability = (properties.major, properties.minor)
        bf16 = "bfloat16" if capability >= (8, 0) else "no bfloat16 products"
        memory = f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB free"
        text = f"{properties.name}, {memory}, capability {capability[0]}.{capability[1]}, {bf16}, driver {driver}"
        found.append(Finding(PART, f"gpu {index}", "ok", text))
    return found


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    match = re.search(r"\b(\d{3,}\.\d+(\.\d+)?)\b", text)
    return match[1] if match else "unknown"


def _kernels(torch: Any, device: str) -> Iterator[Finding]:
    try:
        from tulu_lightning.models.backends import Machine, candidates, lacks
    except Exception as error:
        yield failed_import(KERNELS, "attention", error, "Install the packages again: `make setup`.")
        return
    machine = Machine.of(device)
    for dtype in (torch.float32, torch.bfloat16):
        for trees in (False, True):
            names = candidates("auto", trees, machine)
            reasons = {name: lacks(name, dtype, machine) for name in names}
            fit = [name for name in names if reasons[name] is None]
            text = fit[0] + (f", if it passes its trial; else {' or '.join(fit[1:])}" if fit[1:] else "")
            off = [f"{name} is off because {reason}" for name, reason in reasons.items() if reason]
            kind = "shared prompts" if trees else "documents"
            name = f"attention, {device}, {str(dtype).removeprefix('torch.')}, {kind}"
            yield Finding(KERNELS, name, "ok", "; ".join([text, *off]))
    yield Finding(KERNELS, f"head and loss, {device}", "ok", _loss(device))
    if device == "cpu":
        yield from _compiled()


def _compiled() -> Iterator[Finding]:
    try:
        from tulu_lightning.models import compiled as training
        from tulu_lightning.rollout import compiled as decoding
        from tulu_lightning.rollout.tiles import tiled
    except Exception as error:
        yield failed_import(KERNELS, "compiled functions", error, "Install the packages again: `make setup`.")
        return
    remedy = "Install g++ (Debian: apt install g++): training and the engine in this process are faster with it."
    for name, (there, said) in (("layers", training.available()), ("decoding", decoding.available())):
        if there:
            more = "; bf16 products of few rows by tiles (AMX)" if name == "decoding" and tiled() else ""
            yield Finding(KERNELS, f"{name}, cpu", "ok", f"compiled by {said}{more}")
        else:
            yield Finding(KERNELS, f"{name}, cpu", "off", f"because {said}; PyTorch's operators are taken", remedy)


def _loss(device: str) -> str:
    ours = "ours, in chunks, for log-probs (DPO, PPO) and SFT"
    if device != "cuda":
        return f"{ours}; liger is off because it needs a CUDA GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return f"{ours}; liger is off because it is not installed"
    return f"{ours}; liger's for SFT where it is right and faster at the first step"
