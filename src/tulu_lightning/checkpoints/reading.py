"""What a training checkpoint holds, read tensor by tensor: a file, or the folder of a sharded run."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from tulu_lightning.errors import InputError
from tulu_lightning.models.safe_reader import SafeReader, load_plain
from tulu_lightning.models.saved import newest_in

__all__ = ["TrainingCheckpoint", "newest_checkpoint"]

META = "meta.pt"
"""Of a folder: everything but tensors."""
STATE = "state_dict."


class TrainingCheckpoint:
    """A checkpoint of `tulu fit`.

    Args:
        path: file or folder.

    Raises:
        InputError: it is none, is damaged, or holds objects that could run code.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._reader: SafeReader | None = None
        if self.path.is_dir():
            self.meta = load_plain(self.path / META)
            self._reader = SafeReader(self.path)
            table = self._reader.read_metadata().state_dict_metadata
            self._stored: dict[str, Any] = {
                name.removeprefix(STATE): each
                for name, each in table.items()
                if name.startswith(STATE) and isinstance(each, TensorStorageMetadata)
            }
        else:
            self.meta = load_plain(self.path)
            self._stored = self.meta.pop("state_dict", {})
        if not isinstance(self.meta, dict) or "tulu_stage" not in self.meta or not self._stored:
            what = "is no checkpoint of tulu fit"
            raise InputError(str(path), what, "Give one of RUN/checkpoints, or the run folder.")

    @property
    def names(self) -> list[str]:
        """Names of the network's tensors."""
        return list(self._stored)

    @property
    def stage(self) -> dict[str, Any]:
        """What the stage kept: `step`, `class`, `identity`."""
        return self.meta["tulu_stage"]

    def read(self, name: str) -> Tensor:
        """One whole tensor, on the CPU.

        Raises:
            InputError: there is no such tensor, or its file is damaged.
        """
        if name not in self._stored:
            raise InputError(str(self.path), f"has no tensor {name}", "Give a checkpoint of the same model.")
        stored = self._stored[name]
        if self._reader is None:
            return stored
        whole = {STATE + name: torch.empty(stored.size, dtype=stored.properties.dtype)}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load(whole, storage_reader=self._reader, planner=DefaultLoadPlanner(), no_dist=True)  # type: ignore[arg-type]
        except (OSError, RuntimeError) as error:
            line = str(error).strip().splitlines()[-1]
            raise InputError(str(self.path), f"{name} cannot be read ({line})", "Give another checkpoint.") from error
        return whole[STATE + name]


def newest_checkpoint(run: Path) -> Path:
    """The checkpoint of a run folder after the most steps.

    Raises:
        InputError: it has none.
    """
    newest = newest_in(run / "checkpoints")
    if newest is None:
        what = "has no checkpoint (checkpoints/step-*.ckpt)"
        raise InputError(str(run), what, "Give the folder of a run of tulu fit that has saved, or a checkpoint.")
    return newest
