"""Which engine samples, as settings, and how each is started."""

import math
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal
from urllib.parse import urlsplit

import torch

from tulu_lightning.core.memory import cache_bytes
from tulu_lightning.core.settings import require, require_kind
from tulu_lightning.errors import InputError
from tulu_lightning.models.architectures import find_architecture
from tulu_lightning.models.limits import read_limits
from tulu_lightning.models.lora import Lora
from tulu_lightning.rollout.adapters import room_for
from tulu_lightning.rollout.engine import Engine
from tulu_lightning.rollout.transport import Broadcast, Files, Transport

__all__ = ["EngineSettings", "build_engine", "check_cache", "check_push", "check_shared"]


@dataclass(frozen=True)
class EngineSettings:
    """The engine that samples for training.

    Raises:
        InputError: an unknown kind or dtype, a number out of its range, or a setting that the kind does not read.
    """

    kind: Literal["local", "vllm", "server"] = "local"
    """`local`: in this process, without vLLM. `vllm`: vLLM in this process. `server`: a vLLM server in a process of its
    own, on this machine."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights that it holds."""
    url: str | None = None
    """Of `server`: where one answers that was started by hand, e.g. http://127.0.0.1:8000; null starts one."""
    python: str | None = None
    """Of a server that is started: the interpreter that has vLLM, e.g. .venv-vllm/bin/python; this one if null."""
    max_model_len: int | None = None
    """Longest prompt and response together that vLLM makes room for, in tokens; the model's own limit if null."""
    kv_cache_mb: int | None = 256
    """Memory that vLLM has for keys and values; null lets it take what it finds, as it should on a GPU of its own."""
    broadcast_workers: int | None = None
    """Of `server` with a url on other machines: how many workers (GPUs) it has. Weights are broadcast to them, from this
    rank's device; null: they travel as files in the shared memory of this machine, where the server runs then."""
    push: Literal["merged", "adapter"] = "merged"
    """What a refresh sends of a policy with LoRA: all weights with the adapters merged, or the adapters alone to vLLM, which
    keeps the base as it started with it and computes with both. A server on other machines gets merged ones."""
    seconds: float = 600.0
    """Of `server`: longest wait for a refresh, or for the samples of one prompt."""

    def __post_init__(self) -> None:
        known = self.dtype in ("float32", "bfloat16")
        require(known, "rollout.engine.dtype", repr(self.dtype), "Use 'float32' or 'bfloat16'.")
        require(self.push in ("merged", "adapter"), "rollout.engine.push", repr(self.push), "Use merged or adapter.")
        vllm = ("max_model_len", "kv_cache_mb", "push")
        require_kind(
            self,
            "rollout.engine",
            {
                "local": ("dtype",),
                "vllm": ("dtype", *vllm),
                "server": ("dtype", "url", "python", *vllm, "broadcast_workers", "seconds"),
            },
        )
        if self.broadcast_workers is not None:
            name, remedy = "rollout.engine.broadcast_workers", "Use the server's tensor-parallel size."
            require(self.broadcast_workers >= 1, name, self.broadcast_workers, remedy)
            what = f"{self.broadcast_workers}, and a server that is started here gets files"
            require(self.url is not None, name, what, "Give its url too, or leave it out.")
            what = "adapter, and broadcasts carry merged weights"
            require(self.push == "merged", "rollout.engine.push", what, "Use merged, or leave broadcast_workers out.")
        if self.url is not None:
            for name, neutral in (("python", None), ("kv_cache_mb", 256)):
                remedy = "Leave it out, or leave out the url: then a server is started with it."
                value = getattr(self, name)
                require(
                    value == neutral,
                    f"rollout.engine.{name}",
                    f"{value}, which a server that runs does not read",
                    remedy,
                )
        for name, least in (("max_model_len", 2), ("kv_cache_mb", 1)):
            value = getattr(self, name)
            require(value is None or value >= least, f"rollout.engine.{name}", value, f"Use at least {least}, or null.")
        require(0 < self.seconds < float("inf"), "rollout.engine.seconds", self.seconds, "It must be above 0.")


def build_engine(
    settings: EngineSettings, local: Callable[[torch.dtype], Engine], folder: str, lora: Lora | None = None
) -> Engine:
    """Start an engine.

    Args:
        settings: which.
        local: makes the in-process engine, with the policy's present weights, in a dtype.
        folder: the policy's start weights, which vLLM begins with, as version 0; a server that runs already has
            no version until the first `refresh`.
        lora: of the policy; read where its adapters are pushed alone.

    Raises:
        InputError: vLLM is wanted in this process and not installed.
        EngineError: a server does not start, or does not answer.
    """
    if settings.kind == "local":
        return local(getattr(torch, settings.dtype))
    pushed: dict[str, Any] = {"lora": lora} if settings.push == "adapter" else {}
    room: dict[str, Any] = {"max_model_len": settings.max_model_len, "kv_cache_mb": settings.kv_cache_mb, **pushed}
    if settings.kind == "vllm":
        if find_spec("vllm") is None:
            what = "is vllm, and there is no vLLM in this environment"
            remedy = "Install it, or use server with rollout.engine.python, or local."
            raise InputError("rollout.engine.kind", what, remedy)
        from tulu_lightning.rollout.vllm import VLLMEngine

        return VLLMEngine.from_folder(folder, settings.dtype, **room)
    from tulu_lightning.rollout.server import ServerEngine

    if settings.url is not None:
        longest, way = settings.max_model_len, _transport(settings)
        url, dtype, seconds = settings.url, settings.dtype, settings.seconds
        return ServerEngine(url, folder, dtype, max_model_len=longest, seconds=seconds, transport=way, **pushed)
    return ServerEngine.started(folder, settings.dtype, seconds=settings.seconds, python=settings.python, **room)


def check_shared(settings: EngineSettings, on_gpu: bool) -> None:
    """Refuse vLLM without a limit on the GPU of a trainer: it would not start.

    Args:
        settings: of the engine.
        on_gpu: whether the trainer computes on one.

    Raises:
        InputError: it has none.
    """
    if settings.kind == "vllm" and settings.kv_cache_mb is None and on_gpu:
        what = "is null, and vLLM then asks for nearly all of the GPU, which the trainer's own process is on"
        raise InputError("rollout.engine.kv_cache_mb", what, "Give a number, or use rollout.engine.kind: server.")


def check_push(settings: EngineSettings, lora: Lora | None, in_4_bits: bool) -> None:
    """Refuse to push adapters where there are none, or beside a base that is not the policy's.

    Args:
        settings: of the engine.
        lora: of the policy.
        in_4_bits: whether its base is quantised.

    Raises:
        InputError: one of these, or a rank that vLLM has no room for.
    """
    if settings.push == "merged":
        return
    name = "rollout.engine.push"
    if lora is None:
        what = "is adapter, and the policy has none: backbone.lora is not set"
        raise InputError(name, what, "Use merged, or set backbone.lora.")
    if in_4_bits:
        what = "is adapter, and the policy's base is in 4 bits, which the one that vLLM loads is not"
        raise InputError(name, what, "Use merged: it sends what the codes stand for.")
    room_for(lora.r)


def check_cache(settings: EngineSettings, folder: str) -> None:
    """Refuse memory in which not one sample's keys and values have room: vLLM would not start.

    Args:
        settings: of the engine.
        folder: the model folder; of an architecture that is not Llama's, vLLM itself has to say it.

    Raises:
        InputError: says how much one sample needs.
    """
    if settings.kind == "local" or settings.url is not None or settings.kv_cache_mb is None:
        return
    limits = read_limits(folder)
    tokens = min(settings.max_model_len or limits.positions or 0, limits.positions or settings.max_model_len or 0)
    try:
        shapes = find_architecture(folder, experts=True)
    except InputError:
        return
    needed = math.ceil(cache_bytes(shapes, tokens, 2 if settings.dtype == "bfloat16" else 4) / (1 << 20))
    if limits.window is None and needed > settings.kv_cache_mb:
        what = f"is {settings.kv_cache_mb}, and the keys and values of one sample of {tokens:,} tokens take {needed}"
        raise InputError("rollout.engine.kv_cache_mb", what, "Raise it, or lower rollout.engine.max_model_len.")


def _transport(settings: EngineSettings) -> Transport:
    if settings.broadcast_workers is None:
        return Files()
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    return Broadcast(settings.broadcast_workers, device, _address(settings.url or ""), settings.seconds)


def _address(url: str) -> str:
    """This machine's address as the server sees it: that of the interface that leads there. Sends nothing."""
    server = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((server.hostname or "127.0.0.1", server.port or 80))
        return probe.getsockname()[0]
