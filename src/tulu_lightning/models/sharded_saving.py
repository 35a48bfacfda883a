"""Checkpoints of sharded runs: each rank writes its part into a folder beside, and one rename makes it a checkpoint.

A save that is killed halfway over an older one would load without error as a mixture of both.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.load import _METADATA_FILENAME
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.optim import Optimizer

from tulu_lightning.errors import InputError
from tulu_lightning.files import content_digest, of_the_disk, put_in_place, remove
from tulu_lightning.models.background import WRITING, Background, snapshot
from tulu_lightning.models.safe_reader import SafeReader
from tulu_lightning.models.saved import KEY, check_names, read_header, regroups_moments, write_header
from tulu_lightning.models.watched import WatchedRanks

__all__ = ["ShardedSaving"]


class ShardedSaving(WatchedRanks):
    """The part of `Fsdp2` that writes and reads checkpoints.

    Attributes:
        async_save: write in a thread of its own; the next save, and `wait_for_saves`, wait for it.
        published: called on the first rank with the path of each checkpoint that is there.
    """

    async_save: bool = False
    published: Callable[[Path], None] | None = None
    _writing: Background | None = None
    _group: Any = None  # of the writing threads: their collectives must not come between those of training

    @property
    def mesh(self) -> list[int] | None:
        """How many ranks there are along each axis of `models.mesh.Sizes`; a checkpoint's header says it."""
        return None

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimiser, one that has not made a step yet included (PPO's policy while its critic warms up).

        PyTorch makes such a one take a step with gradients of zero to have a state to save. Saved or not, the first
        real step would be Adam's second then, half as large.
        """
        unused = not optimizer.state
        state = super().optimizer_state(optimizer)
        if unused:
            for values in state["state"].values():
                values["step"].zero_()
            optimizer.state.clear()
        return state

    # Writing ----------------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a folder beside, then rename it: a name either is whole or is not there.

        Raises:
            CheckpointException: a rank could not write its part. In the background, the next save raises it.
        """
        path = Path(self.broadcast(filepath))
        self.wait_for_saves()
        optimizers = {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
        state = {"state_dict": checkpoint.pop("state_dict"), **optimizers}
        beside = path.with_name(f".{path.name}.tmp")
        if self.global_rank == 0:
            remove(beside)
            beside.mkdir(parents=True)
        self.barrier()
        if not self.async_save:
            self._write(state, checkpoint, beside, path, None)
            self.barrier()
            return
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=WRITING)
        taken, rest, group = snapshot(state), snapshot(checkpoint), self._group
        self._writing = self._writing or Background()
        self._writing.start(lambda: self._write(taken, rest, beside, path, group), f"checkpoint {path.name}")

    def _write(self, state: dict[str, Any], rest: dict[str, Any], beside: Path, path: Path, group: Any) -> None:
        """On all ranks; the first one gives the folder its name, once all parts lie on the disk."""
        try:
            save_sharded(state, storage_writer=_Writer(beside, sync_files=True), process_group=group)
            own = {p.name: content_digest([p]) for p in sorted(beside.glob(f"__{self.global_rank}_*.distcp"))}
            everyones: list[Any] = [None] * self.world_size
            dist.all_gather_object(everyones, own, group=group)
            if self.global_rank == 0:
                torch.save(rest, beside / _METADATA_FILENAME)
                write_header(beside, rest.get(KEY, {}), {name: d for part in everyones for name, d in part.items()})
                put_in_place(beside, path)
        except BaseException as error:
            if self.global_rank == 0:
                remove(beside)  # half a checkpoint would keep a full disk full
            failures = error.failures.values() if isinstance(error, CheckpointException) else ()
            for cause in (found for found, _ in failures if isinstance(found, OSError)):
                raise OSError(cause.errno, cause.strerror, str(beside)) from error
            raise
        if self.global_rank == 0 and self.published is not None:
            self.published(path)

    def wait_for_saves(self) -> None:
        """Wait for a checkpoint that is being written; raises what went wrong with it."""
        if self._writing is not None:
            self._writing.wait()

    # Reading ----------------------------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of any number of ranks, or of one process, into the sharded model and its optimisers.

        Raises:
            InputError: it holds another model.
        """
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            # Read here first: what comes after unpickles the same table as it stands.
            saved = SafeReader(path).read_metadata().state_dict_metadata
            shapes = {n: tuple(m.size) for n, m in saved.items() if isinstance(m, TensorStorageMetadata)}
            weights = {n.partition(".")[2]: shape for n, shape in shapes.items() if n.startswith("state_dict.")}
            self._check(path, weights)
            if regroups_moments(path, read_header(path), self.world_size, self.mesh):
                return self._load_numbers(path, weights_only is not False)
            return super().load_checkpoint(path, weights_only=weights_only is not False)
        checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only is not False)
        weights: dict[str, Any] = checkpoint.pop("state_dict")
        self._check(path, {name: tuple(tensor.shape) for name, tensor in weights.items()})
        whole = StateDictOptions(full_state_dict=True)
        assert self.model is not None
        set_model_state_dict(self.model, weights, options=whole)
        for optimizer, state in zip(self.optimizers, checkpoint.pop("optimizer_states"), strict=True):
            if state["state"]:
                named = self._named(optimizer, _in_fp32(optimizer)(state))
                set_optimizer_state_dict(self.model, optimizer, optim_state_dict=named, options=whole)
        return checkpoint

    def _load_numbers(self, path: Path, weights_only: bool) -> dict[str, Any]:
        """A folder whose 8-bit moments are to be cut in another way."""
        assert self.model is not None
        assert self.lightning_module is not None
        weights = {"state_dict": get_model_state_dict(self.model)}
        load_sharded(weights, storage_reader=SafeReader(path))
        self.model.load_state_dict(weights["state_dict"], strict=self.lightning_module.strict_loading)
        for i, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{i}": _in_fp32(optimizer)(get_optimizer_state_dict(self.model, optimizer))}
            load_sharded(state, storage_reader=SafeReader(path, plain=True))
            (found,), options = state.values(), StateDictOptions(cpu_offload=True)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=found, options=options)
        return torch.load(path / _METADATA_FILENAME, map_location="cpu", weights_only=weights_only)

    def _check(self, path: Path, saved: dict[str, tuple[int, ...]]) -> None:
        assert self.model is not None
        tensors: dict[str, Any] = get_model_state_dict(self.model)
        built = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        check_names(str(path), saved, built)

    def _named(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """PyTorch's own state of an optimiser, with parameters by name instead of by number."""
        assert self.model is not None
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
        if len(order) != sum(len(group["params"]) for group in state["param_groups"]):
            what = f"its optimiser has another number of parameters than the {len(order)} of this one"
            raise InputError("ckpt_path", what, "Give a checkpoint of a run with the same settings.")
        groups = [{**g, "params": [order[i] for i in g["params"]]} for g in state["param_groups"]]
        return {"state": {order[i]: values for i, values in state["state"].items()}, "param_groups": groups}

    def teardown(self) -> None:
        """End what is being written, then the watch."""
        if self._writing is not None:
            self._writing.wait()
        super().teardown()


def _in_fp32(optimizer: Optimizer) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What turns the moments of a state into fp32 ones, for optimisers that have others (`stages.adamw8bit`)."""
    return getattr(optimizer, "in_fp32", lambda state: state)


class _Writer(FileSystemWriter):
    """Writes a rank's part; what the disk refuses reaches all ranks as the system said it, which a chain would not."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            if (told := of_the_disk(error, Path(self.path))) is None:
                raise
            raise told from error
