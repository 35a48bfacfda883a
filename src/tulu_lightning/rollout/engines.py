"""Which engine samples, as settings, and how each is started."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from tulu_lightning.core.settings import require
from tulu_lightning.errors import InputError
from tulu_lightning.rollout.engine import Engine

__all__ = ["EngineSettings", "build_engine"]


@dataclass(frozen=True)
class EngineSettings:
    """The engine that samples for training."""

    kind: Literal["local", "vllm", "server"] = "local"
    """`local`: in this process, with the model's own forward. `vllm`: vLLM in this process. `server`: a vLLM server
    that was started apart and answers at `url`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights that it holds."""
    url: str | None = None
    """Address of a server, e.g. http://127.0.0.1:8000."""
    max_model_len: int | None = None
    """Longest prompt and response together that vLLM makes room for, in tokens; the model's own limit if null."""

    def __post_init__(self) -> None:
        for name, known in (("kind", ("local", "vllm", "server")), ("dtype", ("float32", "bfloat16"))):
            value, remedy = getattr(self, name), f"Use one of {', '.join(known)}."
            require(value in known, f"rollout.engine.{name}", repr(value), remedy)
        if (self.kind == "server") != (self.url is not None):
            what = f"is {self.url}, and the engine is {self.kind}"
            raise InputError("rollout.engine.url", what, "A server needs its address, and nothing else has one.")
        if self.max_model_len is not None:
            what = "does nothing: the in-process engine takes what the model takes"
            if self.kind == "local":
                raise InputError("rollout.engine.max_model_len", what, "Leave it out, or set kind to vllm.")
            require(self.max_model_len >= 2, "rollout.engine.max_model_len", self.max_model_len, "Use at least 2.")


def build_engine(settings: EngineSettings, local: Callable[[torch.dtype], Engine], folder: str, **more: Any) -> Engine:
    """Start an engine.

    Args:
        settings: which.
        local: makes the in-process engine, with the policy's present weights, in a dtype.
        folder: the policy's start weights, which the others begin with; `refresh` brings them up to date.
        more: further options of their constructors.

    Raises:
        InputError: vLLM is wanted and not installed.
        EngineError: a server does not answer.
    """
    if settings.kind == "local":
        return local(getattr(torch, settings.dtype))
    if settings.max_model_len is not None:
        more["max_model_len"] = settings.max_model_len
    if settings.kind == "vllm":
        if find_spec("vllm") is None:
            what = "is vllm, which is not installed here"
            raise InputError(
                "rollout.engine.kind", what, "Install it (pip install 'tulu-lightning[vllm]'), or use local."
            )
        from tulu_lightning.rollout.vllm import VLLMEngine

        return VLLMEngine.from_folder(folder, dtype=settings.dtype, **more)
    from tulu_lightning.rollout.server import ServerEngine

    assert settings.url is not None
    return ServerEngine(settings.url, folder, dtype=settings.dtype, **more)
