"""Checkpoints of one process: one file, written beside its name and renamed; folders of sharded runs are read, too."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from tulu_lightning.files import of_the_disk, put_in_place, remove
from tulu_lightning.models.background import Background, snapshot
from tulu_lightning.models.safe_reader import SafeReader
from tulu_lightning.models.saved import KEY, write_header

__all__ = ["SingleFile", "numbered", "read_folder"]


class SingleFile(TorchCheckpointIO):
    """What a `SingleDeviceStrategy` reads and writes checkpoints with.

    Attributes:
        background: write in a thread of its own; the next save, and `wait`, wait for it.
        published: called with the path of each checkpoint that is there.
    """

    def __init__(self, background: bool = False, published: Callable[[Path], None] | None = None) -> None:
        self.background, self.published = background, published
        self._writing = Background()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write, sync, rename: the name is a whole checkpoint or not there.

        Raises:
            OSError: it cannot be written; nothing is left of it. Written in the background, the next save raises it.
        """
        path = Path(path)
        if not self.background:
            self._write(checkpoint, path)
            return
        self._writing.wait()  # before the copy: one that failed stops the run, and two copies need not fit
        taken = snapshot(checkpoint)
        self._writing.start(lambda: self._write(taken, path), f"checkpoint {path.name}")

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.tmp")
        try:
            _write_file(checkpoint, beside)
            write_header(beside, checkpoint.get(KEY, {}))
            put_in_place(beside, path)
        finally:  # half a file would keep a full disk full
            remove(beside)
        if self.published is not None:
            self.published(path)

    def wait(self) -> None:
        """Wait for a checkpoint that is being written; raises what went wrong with it."""
        self._writing.wait()

    teardown = wait

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """A checkpoint on the CPU, a file or a folder of sharded ranks; without `weights_only` no code in it runs."""
        if Path(path).is_dir():
            return read_folder(Path(path), weights_only)
        return super().load_checkpoint(path, map_location, weights_only=weights_only is not False)


def _write_file(checkpoint: dict[str, Any], beside: Path) -> None:
    """`torch.save`, which tells a full disk in its own words, and only its context in the system's."""
    try:
        with beside.open("wb") as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        if (told := of_the_disk(error, beside)) is None:
            raise
        raise told from error


def read_folder(path: Path, weights_only: bool | None = None) -> dict[str, Any]:
    """A folder of sharded ranks as the checkpoint of one process, whole on the CPU.

    Returns:
        What Lightning gives its hooks, with each optimiser's state by the number of the parameter.
    """
    parts: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner()
    _load_state_dict(parts, SafeReader(path), planner=planner, no_dist=True)
    result = torch.load(path / _METADATA_FILENAME, map_location="cpu", weights_only=weights_only is not False)
    count = sum(name.startswith("optimizer_") for name in parts)
    result["state_dict"] = parts["state_dict"]
    result["optimizer_states"] = [numbered(parts[f"optimizer_{i}"]) for i in range(count)]
    return result


def numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's state with parameters by name, as PyTorch's own: by their numbers, in the groups' order."""
    groups, names = [], []
    for group in state["param_groups"]:
        first = len(names)
        names += group["params"]
        groups.append({**group, "params": list(range(first, len(names)))})
    return {"state": {i: state["state"][name] for i, name in enumerate(names)}, "param_groups": groups}
