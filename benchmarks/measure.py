"""What a benchmark says beside its times: the machine, its matmul peak, the useful FLOPs of a step, a run on its own."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

FORMULA = (
    "6 x weights of the decoder's matrices x tokens (no padding), + 6 x vocabulary x width x trained tokens (the head "
    "is needed for no other), + 12 x layers x heads x head width x query-key pairs (n (n + 1) / 2 a row): forward 2, "
    "backward 4 a multiplication; nothing that is computed twice or for padding counts"
)


@dataclass(frozen=True)
class Shape:
    """The parts of a Llama-like model that cost FLOPs."""

    width: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    inner: int
    vocabulary: int

    @classmethod
    def of(cls, folder: str | Path) -> "Shape":
        config = AutoConfig.from_pretrained(folder)
        head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_width,
            config.intermediate_size,
            config.vocab_size,
        )

    @property
    def decoder(self) -> int:
        """Weights of all matrices but the embedding and the head."""
        attention = 2 * self.width * self.head_width * (self.heads + self.key_heads)
        return self.layers * (attention + 3 * self.width * self.inner)

    def flops(self, tokens: float, trained: float, pairs: float) -> float:
        """Useful FLOPs of forward and backward; see FORMULA."""
        head = self.vocabulary * self.width
        attention = 2 * self.layers * self.heads * self.head_width
        return 6 * (self.decoder * tokens + head * trained + attention * pairs)


def matmul_peak(dtype: torch.dtype, shape: Shape, seconds: float = 0.3) -> dict[str, Any]:
    """The best rate of a matrix product: large squares, and the products that the model is made of; on a GPU if there is one.

    `torch.mm` in fp32 is MKL's, which on an AMD processor can be half as fast as oneDNN; the faster one is the peak.

    Args:
        dtype: of the factors.
        shape: of the model.
        seconds: to spend on each size; the fastest call counts.

    Returns:
        `flops`; the best of `torch.mm` alone, `mm_flops`; and the rate of every size and route in GFLOP/s.
    """
    gpu = torch.cuda.is_available()
    device, wait = ("cuda", torch.cuda.synchronize) if gpu else ("cpu", lambda: None)
    sizes = [(size, size, size) for size in ((4096, 8192) if gpu else (1024, 2048, 4096))]
    sizes += [(2048, shape.width, shape.inner), (2048, shape.inner, shape.width), (2048, shape.width, shape.width)]
    sizes += [(512, shape.width, shape.vocabulary), (shape.width, 2048, shape.inner)]
    routes: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"mm": lambda a, b: torch.mm(a, b.T)}
    if not gpu and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        routes["onednn"] = lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    rates = {}
    for m, k, n in sizes:
        a, b = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))  # a @ b.T, as nn.Linear has it
        for route, product in routes.items():
            product(a, b)
            wait()
            best, until = float("inf"), time.perf_counter() + seconds
            while time.perf_counter() < until or best == float("inf"):
                started = time.perf_counter()
                product(a, b)
                wait()
                best = min(best, time.perf_counter() - started)
            rates[f"{route} {m}x{k}x{n}"] = 2 * m * k * n / best
    return {
        "flops": max(rates.values()),
        "mm_flops": max(rate for name, rate in rates.items() if name.startswith("mm ")),
        "gflops": {name: round(rate / 1e9, 1) for name, rate in rates.items()},
    }


def run_worker(script: Path, job: Any, cache: Path | None = None) -> Any:
    """One job in a process of its own, so that its peak memory is its own; or a list of jobs, one after the other.

    Args:
        script: prints its result as JSON on the last line of stdout.
        job: its one argument (`peers/jobs.py`).
        cache: an empty folder in place of the user's cache, for what must not be found ready.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    environment = os.environ | ({"TULU_CACHE": str(cache)} if cache else {})
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(job)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{script.name} failed on {json.dumps(job)}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and with what."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    packages = ("torch", "transformers", "trl", "accelerate", "datasets", "lightning", "liger-kernel", "tulu-lightning")
    return {
        "cpu": names[0] if names else platform.processor(),
        **gpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # of the last minute, before the first run: a quiet machine is below 0.3
        "environment": {
            key: os.environ[key] for key in os.environ if key.startswith(("OMP_", "GOMP_", "MKL_", "MALLOC_", "LD_PRE"))
        },
        "versions": {"python": platform.python_version(), **_versions(packages)},
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def gpu() -> dict[str, Any]:
    """The GPU and its driver's CUDA, where there is one."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # liger is for GPUs only
            continue
    return found


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
