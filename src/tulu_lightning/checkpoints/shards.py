"""Safetensors files of a Hugging Face folder, written tensor by tensor: nobody holds more than one file of them."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tulu_lightning.errors import InputError
from tulu_lightning.files import system_code

__all__ = ["SHARD_BYTES", "ShardWriter", "parse_size", "save_tensors", "write_shards"]

SHARD_BYTES = 5_000_000_000
"""Largest file of weights, in bytes, as on the hub."""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one file as PyTorch's tensors.

    Raises:
        OSError: the disk refuses; names the file, which safetensors does not.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        code = system_code(error)
        if not code:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error


def parse_size(where: str, text: str) -> int:
    """Bytes of a size such as `5GB` or `200MB`.

    Raises:
        InputError: it is no such size.
    """
    unit = text.strip().upper()[-2:]
    number = text.strip()[:-2]
    try:
        size = int(float(number) * UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise InputError(where, f"is {text!r}", "Give a size such as 5GB or 200MB.")
    return size


class ShardWriter:
    """Collects tensors into files of at most so many bytes; a larger tensor has a file to itself.

    Of several ranks that all add the same tensors in the same order, each writes every `ranks`-th file and keeps only
    the tensors of its own.

    Args:
        folder: where to, on a disk that all ranks see.
        max_bytes: of a file.
        rank: this process.
        ranks: how many there are.
    """

    def __init__(self, folder: Path, max_bytes: int = SHARD_BYTES, rank: int = 0, ranks: int = 1) -> None:
        self.folder, self._max, self._rank, self._ranks = folder, max_bytes, rank, ranks
        self._held: dict[str, Tensor] = {}
        self._shard, self._bytes = 0, 0
        self._places: dict[str, int] = {}
        self._total = self._parameters = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take the next tensor; on whichever device, it is written from the CPU.

        Raises:
            ValueError: the name is there already.
        """
        if name in self._places:
            raise ValueError(f"{name} is there already")
        size = tensor.numel() * tensor.element_size()
        if self._bytes and self._bytes + size > self._max:
            self._flush()
        self._places[name] = self._shard
        self._bytes += size
        self._total += size
        self._parameters += tensor.numel()
        if self._mine:
            self._held[name] = tensor.detach().to("cpu").contiguous()

    def finish(self) -> None:
        """Write what is held. After this, and once all ranks are here, `name_files` gives the files their names."""
        if self._bytes:
            self._flush()

    def name_files(self) -> None:
        """Rename the files and write the index; for one rank, when all have finished."""
        names = {shard: _file_name(shard, self._shard) for shard in range(self._shard)}
        for shard, name in names.items():
            os.rename(self._part(shard), self.folder / name)
        if self._shard > 1:
            index = {
                "metadata": {"total_size": self._total, "total_parameters": self._parameters},
                "weight_map": {name: names[shard] for name, shard in sorted(self._places.items())},
            }
            path = self.folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    @property
    def _mine(self) -> bool:
        return self._shard % self._ranks == self._rank

    def _part(self, shard: int) -> Path:
        return self.folder / f"part-{shard:05d}.safetensors"

    def _flush(self) -> None:
        if self._mine:
            save_tensors(self._held, self._part(self._shard))
            self._held = {}
        self._shard, self._bytes = self._shard + 1, 0


def _file_name(shard: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"


def write_shards(
    weights: Iterable[tuple[str, Tensor]], folder: Path, max_bytes: int, dtype: torch.dtype | None
) -> None:
    """Write weights on one process.

    Args:
        weights: names and tensors, one alive at a time.
        folder: where to.
        max_bytes: of a file.
        dtype: of floating-point tensors; as they are if left out.
    """
    writer = ShardWriter(folder, max_bytes)
    for name, tensor in weights:
        writer.add(name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor)
    writer.finish()
    writer.name_files()
