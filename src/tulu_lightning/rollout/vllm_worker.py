"""What runs beside the model inside vLLM: it takes weights, and says what it got and what its layers hold.

vLLM mixes `Worker` into its own worker by name (`worker_extension_cls`), in this process or in a server's. Nothing here
imports vLLM, so the file can be read, and most of it tested, without it.

What its layers then hold is read back by `rollout.held_weights` and, of adapters, `rollout.adapter_proof`.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tulu_lightning.rollout.adapter_proof import compare_adapter
from tulu_lightning.rollout.channel import Channel
from tulu_lightning.rollout.fingerprint import mark
from tulu_lightning.rollout.held_weights import chosen_columns, held

__all__ = ["Report", "Worker", "repack_tied_head"]


class Report(NamedTuple):
    """What a worker says after a refresh."""

    received: dict[str, str]
    """`fingerprint.mark` of each tensor as it arrived, all elements, in the dtype of the model."""
    differ: list[str]
    """Tensors that the layers compute with in another form than they arrived."""
    unproved: list[str]
    """Tensors that arrived but were not found in a layer under their name: only `received` speaks for them."""


class Worker:
    """Mixed into vLLM's worker: methods for `collective_rpc`. Their names must not clash with vLLM's."""

    model_runner: Any
    rank: int
    device: Any
    _tulu_version: int | None = None
    _tulu_channel: Channel | None = None

    def tulu_load(self, named: Iterable[tuple[str, Tensor]], columns: int, seed: int) -> dict[str, Any]:
        """Put the tensors where they belong, in place, and compare what the layers then hold with what arrived.

        Args:
            named: by Hugging Face names.
            columns: how many columns of each matrix to compare; 0 for all.
            seed: chooses them.

        Returns:
            A `Report`, as a dict.
        """
        model, dtype = self.model_runner.get_model(), self.model_runner.model_config.dtype
        received, samples = dict[str, str](), dict[str, Tensor]()

        def arriving() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in named:
                value = tensor.to(dtype) if tensor.is_floating_point() else tensor
                received[name] = mark(value)
                samples[name] = chosen_columns(value, columns, seed)
                yield name, value

        self.model_runner.reload_weights(weights_iterator=arriving())
        self._tulu_repack(model)
        differ, unproved = _compare(model, samples, columns, seed)
        return Report(received, differ, unproved)._asdict()

    def tulu_load_files(self, folder: str, columns: int, version: int) -> dict[str, Any]:
        """`tulu_load` from a folder's safetensors files, in the order of their names; then they bear that version."""
        self._tulu_version = -1
        report = self.tulu_load(_files(Path(folder)), columns, version)
        self._tulu_version = version
        return report

    def tulu_adapter(self, folder: str, version: int) -> dict[str, Any]:
        """What the layers hold of an adapter that vLLM has loaded from a folder, as a `Report`; then they bear that version."""
        self._tulu_version = -1
        report = compare_adapter(self.model_runner, Path(folder))
        self._tulu_version = version
        return report

    def tulu_join(self, host: str, port: int, world: int, seconds: float) -> dict[str, int]:
        """Come to the trainer's channel; it is rank 0, the workers follow."""
        self._tulu_channel = Channel(host, port, 1 + self.rank, world, torch.device(self.device), seconds)
        return {"rank": 1 + self.rank}

    def tulu_load_channel(self, shapes: dict[str, list[int]], columns: int, version: int) -> dict[str, Any]:
        """`tulu_load` of what the trainer broadcasts; `shapes` lists all that may come."""
        assert self._tulu_channel is not None
        self._tulu_version = -1
        arriving = self._tulu_channel.receive(shapes, self.model_runner.model_config.dtype)
        report = self.tulu_load(arriving, columns, version)
        self._tulu_version = version
        return report

    def tulu_version(self, stamp: int | None = None) -> dict[str, int | None]:
        """Version of the weights held; None in a server that was just started, unless it is stamped now."""
        if stamp is not None:
            self._tulu_version = stamp
        return {"version": self._tulu_version}

    def tulu_marks(self) -> dict[str, str]:
        """Marks of the tensors that this worker's layers hold whole, as they are read out; a zero's sign is lost."""
        parts = held(self.model_runner.get_model(), 0, 0)
        return {part.name: mark(part.value) for part in parts if part.is_whole}

    def _tulu_repack(self, model: nn.Module) -> None:
        repack_tied_head(model)


def _files(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)


def repack_tied_head(model: Any) -> None:
    """Pack a head again that shares its weights with the embedding.

    On a CPU the head keeps a packed copy, and vLLM's reload renews it only if the checkpoint names a head. Without
    this a refreshed model reads prompts with the new embedding and picks tokens with the old one.
    """
    head, inner = getattr(model, "lm_head", None), getattr(model, "model", model)
    embedding = getattr(inner, "embed_tokens", None)
    if head is None or embedding is None or not hasattr(head, "cpu_linear"):  # no packed copy: nothing to renew
        return
    if head is not embedding and head.weight.data_ptr() == embedding.weight.data_ptr():
        head.quant_method.process_weights_after_loading(head)


def _compare(model: Any, samples: Mapping[str, Tensor], columns: int, seed: int) -> tuple[list[str], list[str]]:
    now, differ = set[str](), list[str]()
    for part in held(model, columns, seed):
        now.add(part.name)
        sample = samples.get(part.name)
        if sample is None and part.name == "lm_head.weight":  # tied, and sent as the embedding
            sample = samples.get("model.embed_tokens.weight")
        if sample is not None and not torch.equal(part.of(sample).to(part.value.device), part.value):
            differ.append(part.name)
    return differ, [name for name in samples if name not in now]
