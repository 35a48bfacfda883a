"""A model folder's safetensors files read tensor by tensor, or rows of one, without the rest.

Nothing but the headers is read until a tensor is asked for, and what is read is not kept: whoever fills a shard of a
model never holds more than one tensor's part beside it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tulu_lightning.errors import InputError

__all__ = ["WeightFiles"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
REMEDY = "Save or copy the model again (save_pretrained), or give another one."
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
"""Names of dtypes in a header."""


class WeightFiles:
    """The tensors of a model folder: one `model.safetensors`, or several files and their index."""

    def __init__(self, folder: str | Path) -> None:
        """Read the headers.

        Args:
            folder: the model folder.

        Raises:
            InputError: there are no safetensors, a file that the index names is missing or damaged, or the index names
                a tensor that its file does not have.
        """
        self.folder = Path(folder)
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        index = self._index()
        for name in sorted(set(index.values())) if index is not None else [SINGLE]:
            self._read_header(self.folder / name)
        for name, file in (index or {}).items():
            if self._files.get(name) != self.folder / file:
                raise InputError(str(folder), f"{INDEX} says that {file} has {name}, which it does not", REMEDY)

    def _index(self) -> dict[str, str] | None:
        path = self.folder / INDEX
        if (self.folder / SINGLE).is_file() or not path.is_file():  # as transformers chooses
            return None
        try:
            files: dict[str, str] = json.loads(path.read_text("utf-8"))["weight_map"]
            inside = all(Path(file).name == file for file in files.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(str(path), "is no index of weights", REMEDY) from error
        if not files or not inside:
            raise InputError(str(path), "is no index of files beside it", REMEDY)
        return files

    def _read_header(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(str(self.folder), f"it has no {path.name}", REMEDY)
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  it is no dictionary
                    part = file.get_slice(name)
                    self._files[name] = path
                    self._shapes[name] = tuple(part.get_shape())
                    self._dtypes[name] = DTYPES[part.get_dtype()]
        except (SafetensorError, OSError, KeyError) as error:
            raise InputError(str(path), f"is damaged ({_first_line(error)})", REMEDY) from error

    def names(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self._files)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape.

        Raises:
            InputError: there is none of this name.
        """
        self._find(name)
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype as stored; errors as above."""
        self._find(name)
        return self._dtypes[name]

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """A tensor, or its rows `first` to before `last` along dimension 0; errors as above, or the file is damaged.

        Args:
            name: of the tensor.
            first: first row.
            last: the row after the last one; None for all.
        """
        path, shape = self._find(name), self._shapes[name]
        if not shape:
            return self._take(path, name, None)
        return self._take(path, name, (slice(first, shape[0] if last is None else last),))

    def read_part(self, name: str, places: Sequence[slice]) -> Tensor:
        """A block of a tensor: one slice for each dimension; errors as above."""
        return self._take(self._find(name), name, tuple(places))

    def _take(self, path: Path, name: str, places: Any) -> Tensor:
        try:
            with safe_open(path, "pt") as file:
                part = file.get_tensor(name) if places is None else file.get_slice(name)[places]
                return part.clone()  # a view of the mapped file would keep its pages in this process's memory
        except (SafetensorError, OSError) as error:
            raise InputError(str(path), f"is damaged ({_first_line(error)})", REMEDY) from error

    def _find(self, name: str) -> Path:
        if name not in self._files:
            known = self.names()
            what = f"its weights have no tensor {name} among their {len(known)}"
            raise InputError(str(self.folder), what, REMEDY)
        return self._files[name]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
