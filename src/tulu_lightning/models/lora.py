"""LoRA (Hu et al. 2021) through peft's layers: the model's class, names and forward stay, its linear layers get adapters.

Only the adapters train; the rest is the start, which PPO's reference therefore needs no copy of. Whoever takes weights
out (engines, exports) takes them merged, from `models.weights.plain_weights`, or the adapters alone. Checkpoints hold base and adapters; of a
4-bit base, the adapters alone (`save_trained_only`).
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tulu_lightning.core.settings import require
from tulu_lightning.errors import InputError
from tulu_lightning.models.weights import fill

__all__ = ["Lora", "adapt", "adapter_weights", "save_trained_only", "start_adapters", "targets_of", "without_adapters"]


@dataclass(frozen=True)
class Lora:
    """Adapters `W + s · B A` on linear layers of the decoder. There is no dropout: a step has to be the same however it
    is cut, and a ratio of policies is 1 only without it."""

    r: int = 16
    """Rank: rows of A, columns of B."""
    alpha: int = 32
    """The scale s is alpha / r, or alpha / √r with `rslora`."""
    targets: list[str] | None = None
    """Names of the layers, e.g. [q_proj, v_proj]; all linear layers of the decoder when null."""
    rslora: bool = False
    """Rank-stabilised scale (Kalajdzievski 2023), for large ranks."""
    seed: int = 0
    """Of A's random start; B starts at 0, so the model starts as it was."""

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)

    def __post_init__(self) -> None:
        require(self.r >= 1, "lora.r", self.r, "Use at least 1.")
        require(self.alpha >= 1, "lora.alpha", self.alpha, "Use at least 1.")
        require(self.targets != [], "lora.targets", self.targets, "Name at least one layer, or leave it out for all.")


def adapt(lm: PreTrainedModel, lora: Lora, folder: str) -> None:
    """Put adapters into a model in place, fp32 ones, and freeze everything else.

    Those of a model on meta have no numbers yet; `start_adapters` gives them, once they have memory.

    Args:
        lm: the model.
        lora: settings.
        folder: where it came from, for the message.

    Raises:
        InputError: a target that the decoder has no linear layer of, or a decoder without linear layers.
    """
    from peft import LoraConfig, inject_adapter_in_model  # slow to import, and most runs need none of it

    decoder: Any = lm.get_decoder()
    known = sorted({name.rpartition(".")[2] for name, part in decoder.named_modules() if isinstance(part, nn.Linear)})
    targets = known if lora.targets is None else lora.targets
    if unknown := sorted(set(targets) - set(known)):
        what = f"lora.targets names {unknown[0]!r}, and its decoder's linear layers are {', '.join(known) or 'none'}"
        raise InputError(folder, what, "Name some of these, or leave targets out for all of them.")
    if not targets:
        raise InputError(folder, "its decoder has no linear layers to adapt", "Train it whole: leave out lora.")
    settings = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=list(targets), lora_dropout=0.0, use_rslora=lora.rslora
    )  # type: ignore[call-arg]
    lm.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # peft draws numbers, which are not kept
        inject_adapter_in_model(settings, decoder)
    for _, parameter in _adapters(decoder):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    start_adapters(decoder, lora)


@torch.no_grad()
def start_adapters(decoder: nn.Module, lora: Lora) -> None:
    """Give adapters their start: A uniform in ±1/√K as LoRA's authors have it, B 0.

    Each A has random numbers of its own by the seed and its name: they are the same sharded, and the run's random state
    stays as it was.

    Args:
        decoder: what `adapt` put them into; sharded or not. Those on meta are left alone.
        lora: the settings.
    """
    for name, parameter in _adapters(decoder):
        if parameter.is_meta:
            continue
        whole = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            digest = hashlib.sha256(f"{lora.seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            bound = parameter.shape[1] ** -0.5
            whole.uniform_(-bound, bound, generator=generator)
        fill(parameter, whole)


def _adapters(decoder: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in decoder.named_parameters() if ".lora_" in name)


def targets_of(names: Iterable[str]) -> list[str]:
    """The last words of the layers that adapters of these names belong to, e.g. q_proj."""
    return sorted({name.split(".lora_")[0].rpartition(".")[2] for name in names})


def adapter_weights(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The adapters alone, sharded where they are sharded, by the names of peft's files without their first two words.

    Example: `model.layers.0.self_attn.q_proj.lora_A.weight`, `[r, inputs]`, and `…lora_B.weight`, `[outputs, r]`.
    """
    lm.state_dict()  # FSDP2 puts its shards back for it
    for name, parameter in _adapters(lm):
        yield name.replace(".default.", "."), parameter.detach()


def save_trained_only(module: nn.Module) -> None:
    """Let a module's state dict hold what trains alone, and a load of such a one leave the rest as it is.

    What is frozen is the start, which is loaded anew before a checkpoint is.

    Args:
        module: the model, or its decoder if that is taken out of it.
    """
    module.register_state_dict_post_hook(_drop_frozen)
    module.register_load_state_dict_pre_hook(_keep_frozen)


def _frozen(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    everything = module.named_parameters(remove_duplicate=False)  # a tied head has two names
    return ((name, parameter) for name, parameter in everything if not parameter.requires_grad)


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any]) -> None:
    for name, _ in _frozen(module):
        state.pop(prefix + name, None)


def _keep_frozen(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name, parameter in _frozen(module):
        state.setdefault(prefix + name, parameter.detach())  # is copied onto itself


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was before training, as long as the context lasts."""
    layers: list[Any] = [part for part in model.modules() if hasattr(part, "base_layer")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
