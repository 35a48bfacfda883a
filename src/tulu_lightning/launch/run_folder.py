"""The folder of a run: where it is, whether it can be written, and what to resume from."""

import os
import tempfile
from pathlib import Path

from tulu_lightning.errors import InputError, nearest
from tulu_lightning.models.saved import newest_in

__all__ = ["ensure_writable", "latest_checkpoint", "resolve_checkpoint"]

LIGHTNING_NAMES = ("best", "hpc", "registry")
"""Values of `ckpt_path` that Lightning resolves by callbacks and services of its own, which have no checkpoints of ours."""


def ensure_writable(folder: str | Path) -> Path:
    """Create a run folder and prove that a file can be written there.

    Raises:
        InputError: it cannot be.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as probe:
            probe.write(b"tulu")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        what = f"the run folder cannot be written ({error.strerror})"
        raise InputError(str(folder), what, "Set trainer.default_root_dir to a folder you can write to.") from error
    return folder


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, by step, or None.

    Checkpoints (files, or folders when sharded) are written as `.step-<n>.ckpt.tmp` and renamed, so one that has its
    name is complete.
    """
    return newest_in(Path(folder, "checkpoints"))


def resolve_checkpoint(wanted: str | Path | None, folder: str | Path) -> str | None:
    """What `ckpt_path` means.

    Args:
        wanted: `auto` is the run's newest checkpoint, or none if there is none yet; `last` is the same, but there must
            be one; `none` starts from the start weights; anything else is a checkpoint's path.
        folder: the run folder.

    Raises:
        InputError: there is no such checkpoint.
    """
    if wanted is None or str(wanted) == "none":
        return None
    if str(wanted) in ("auto", "last"):
        newest = latest_checkpoint(folder)
        if newest is None and str(wanted) == "last":
            what = f"is last, and {Path(folder, 'checkpoints')} holds no checkpoint"
            raise InputError("ckpt_path", what, "Use auto, which starts where there is nothing to go on with.")
        return None if newest is None else str(newest)
    if Path(wanted).exists():
        return str(wanted)
    if "://" in str(wanted):
        what = f"is {wanted}, an address, and checkpoints are read from a disk"
        raise InputError("ckpt_path", what, "Copy it there first, and give its path.")
    if str(wanted) in LIGHTNING_NAMES:
        what = f"is {wanted}, which Lightning's own ModelCheckpoint and the like would know, not Checkpoints"
        raise InputError("ckpt_path", what, "Use auto, last, none or the path of a checkpoint.")
    there = [str(path) for path in Path(wanted).parent.glob("*.ckpt")]
    remedy = nearest(str(wanted), there) if there else "Give an existing one, or auto to resume the run if it can be."
    raise InputError("ckpt_path", f"there is no checkpoint {str(wanted)!r}", remedy)
