"""Room on the disk that a run will take, from shapes and dtypes alone, before any weights load."""

import json
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.progress import bytes_text

__all__ = ["Space", "check_space", "shapes", "space_of"]

TIGHT = 1.1
"""Less room than this many times the estimate is worth a warning: logs, rollouts and other users write, too."""
MOMENTS = 2
SMALL = 4096
"""Tensors of fewer numbers have 32-bit moments also where others have 8-bit ones (`stages.adamw8bit`)."""


class Space(NamedTuple):
    """Bytes."""

    weights: int
    """Of a checkpoint, all networks that it holds."""
    moments: int
    """Of a checkpoint: optimiser states."""
    engine: int
    """Of a checkpoint: the engine's weights where they may be older than the policy's."""
    export: int
    """The Hugging Face folder at the end."""

    @property
    def checkpoint(self) -> int:
        """One checkpoint."""
        return self.weights + self.moments + self.engine


def shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model folder's tensors, from the heads of its safetensors."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            head = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        found |= {name: tuple(entry["shape"]) for name, entry in head.items() if name != "__metadata__"}
    return found


class _Network(NamedTuple):
    """What one network takes, in bytes, and its numbers."""

    numbers: int
    weights: int
    moments: int


def _network(folder: str, backbone: Backbone, layers: int | None, bits: int, scalar_head: bool) -> _Network:
    tensors = {name: shape for name, shape in shapes(folder).items() if _stays(name, layers)}
    if scalar_head:
        tensors = {name: shape for name, shape in tensors.items() if not name.startswith(("lm_head.", "score."))}
        tensors["score.weight"] = (1, min((s[0] for n, s in tensors.items() if n.endswith("norm.weight")), default=0))
    size = 2 if backbone.weights_dtype == "bfloat16" else 4
    numbers = sum(map(math.prod, tensors.values()))
    if backbone.lora is None:
        moments = sum(_moments(math.prod(shape), size, bits) for shape in tensors.values())
        return _Network(numbers, size * numbers, moments)
    adapters = [n for name, shape in tensors.items() for n in _adapters(name, shape, backbone.lora)]
    base = 0 if backbone.quantize is not None else size * numbers
    if backbone.quantize is not None and scalar_head:
        adapters.append(math.prod(tensors["score.weight"]))
    return _Network(numbers, base + 4 * sum(adapters), sum(_moments(n, 4, bits) for n in adapters))


def _stays(name: str, layers: int | None) -> bool:
    _, found, rest = name.partition(".layers.")
    return layers is None or not found or int(rest.partition(".")[0]) < layers


def _adapters(name: str, shape: tuple[int, ...], lora: Any) -> Iterator[int]:
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if ".layers." in name and len(shape) == 2 and (lora.targets is None or leaf in lora.targets):
        yield lora.r * shape[1]
        yield lora.r * shape[0]


def _moments(numbers: int, size: int, bits: int) -> int:
    if bits == 8 and numbers >= SMALL:
        return MOMENTS * (numbers + 4 * -(-numbers // 256))
    return MOMENTS * size * numbers


def space_of(stage: Any) -> Space:
    """What one checkpoint and the export of a stage take.

    Args:
        stage: with a trainer, its networks not built.
    """
    backbone: Backbone = stage.backbone
    policy = _network(stage.folder, backbone, backbone.layers, stage.optimizer.state_bits, not stage.speaks)
    weights, moments, engine = policy.weights, policy.moments, 0
    if (critic := getattr(stage, "critic_config", None)) is not None:
        second = _network(stage.critic_folder, backbone, critic.layers, critic.optimizer.state_bits, True)
        weights, moments = weights + second.weights, moments + second.moments
    rollout = getattr(stage, "rollout", None)
    if rollout is not None and stage.identity().get("refresh every_n_steps", 1) != 1:
        engine = (2 if backbone.weights_dtype == "bfloat16" else 4) * policy.numbers
    stored = 2 if backbone.weights_dtype == "bfloat16" and backbone.lora is None else 4
    return Space(weights, moments, engine, stored * policy.numbers)


def check_space(run: Path, stage: Any, every_n_steps: int, keep: int, exports: int = 1) -> None:
    """Refuse to start a run whose checkpoints and export the disk has no room for, and warn where it is tight.

    While a checkpoint is written, the `keep` before it are still there; what is there of an earlier start counts as room.

    Args:
        run: the run folder.
        stage: with a trainer, its networks not built.
        every_n_steps: steps between saves; 0 is one save.
        keep: checkpoints that stay.
        exports: how many may lie there together; one there will be, so more than one is only warned of.

    Raises:
        InputError: there is less room than the run takes.
    """
    space = space_of(stage)
    saves = -(-stage.total_steps // every_n_steps) if every_n_steps else 1
    count = min(keep + 1, saves)
    # Half a save of a kill is among them: the first save removes it.
    there = sum(_held(path) for name in ("step-*.ckpt", ".step-*.tmp") for path in run.glob(f"checkpoints/{name}"))
    needed = count * space.checkpoint + space.export
    free = shutil.disk_usage(next(p for p in (run, *run.absolute().parents) if p.exists())).free + there
    said = (
        f"the run takes up to {bytes_text(needed)} ({count} checkpoints of {bytes_text(space.checkpoint)}: weights "
        f"{bytes_text(space.weights)}, optimiser {bytes_text(space.moments)}; export {bytes_text(space.export)}), and the disk has "
        f"{bytes_text(free)}"
    )
    if needed > free:
        remedy = "Free some space, set another trainer.default_root_dir, or keep fewer checkpoints (Checkpoints.keep)."
        raise InputError(str(run), said, f"{remedy} Checkpoints.check_disk: false does not ask.")
    if needed * TIGHT > free:
        rank_zero_warn(f"{run}: {said}, which is little more")
    elif (needed + (exports - 1) * space.export) * TIGHT > free:
        all_of_them = bytes_text((exports - 1) * space.export)
        rank_zero_warn(f"{run}: {said}; {exports - 1} more exports, if each is made, take {all_of_them} beside it")


def _held(path: Path) -> int:
    """Bytes of a file, or of a folder's files."""
    return sum(each.stat().st_size for each in (path, *path.rglob("*")) if each.is_file())
