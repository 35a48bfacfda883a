"""When a run is saved, and how it stops when asked to.

A save goes to a hidden name beside its own and is renamed, so a name is either whole or not there. Ctrl-C (or
SIGTERM) sets a flag; the step in progress is finished, saved, and the run ends resumable. A second Ctrl-C does not
wait.

A run folder holds one run. Its `identity.json` says which, and a start with other settings, or one that would begin
anew over what is there, is refused.
"""

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L

from tulu_lightning.checkpoints.identity import check_run, read_identity, write_identity
from tulu_lightning.data.base import StepData
from tulu_lightning.errors import InputError
from tulu_lightning.files import write_whole
from tulu_lightning.models.sharding import Fsdp2

__all__ = ["Checkpoints", "checkpoint_path"]

LEFT = ("checkpoints/step-*.ckpt", "scores/after.json", "summary.json")
"""What only a run that got somewhere leaves in its folder; a start from step 0 would mix it with its own."""
SCORES = "scores/before.json"
MANIFEST = "data_manifest.json"
"""What the run is trained on; see `data.manifest`."""


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` finished steps lies."""
    return run / "checkpoints" / f"step-{step:06d}.ckpt"


class Checkpoints(L.Callback):
    """Save every so many of *our* steps, at the end, and when told to stop.

    Args:
        every_n_steps: steps between saves; 0 saves only at the end and when stopping.
        keep: how many of the newest to keep.

    Raises:
        InputError: `every_n_steps` is below 0 or `keep` below 1.
    """

    def __init__(self, every_n_steps: int = 100, keep: int = 1) -> None:
        super().__init__()
        if every_n_steps < 0:
            raise InputError("Checkpoints.every_n_steps", f"is {every_n_steps}", "Use 0 to save only at the end.")
        if keep < 1:
            raise InputError("Checkpoints.keep", f"is {keep}", "Use at least 1.")
        self.every_n_steps, self.keep = every_n_steps, keep
        self.stop_requested, self._speaks = False, True
        self._previous: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a folder that holds another run, before its config is written there and any weights load."""
        if stage != "fit":
            return
        run = Path(trainer.default_root_dir)
        identity = pl_module.identity()
        if _left(run, *LEFT, SCORES):
            check_run(str(run), read_identity(run), pl_module)
        trainer.strategy.barrier("identity")  # nobody reads what the first rank writes next
        if trainer.is_global_zero:
            write_identity(run, identity)
            if isinstance(data := trainer.datamodule, StepData):  # type: ignore[attr-defined]
                write_whole(run / MANIFEST, json.dumps(data.manifest(), indent=1, ensure_ascii=False))

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse to start over before anything is scored; a sharded checkpoint has not been loaded yet here."""
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._refuse_to_start_over(trainer, pl_module)

    def _refuse_to_start_over(self, trainer: L.Trainer, pl_module: Any) -> None:
        # A run that was killed before its first checkpoint has left nothing that matters, and simply starts again.
        run = Path(trainer.default_root_dir)
        if pl_module.step == 0 and (found := _left(run, *LEFT)):
            what = f"the run would start from step 0, and the folder holds {found} of an earlier start"
            remedy = "Set ckpt_path to auto to go on, give another run folder (trainer.default_root_dir), or remove it."
            raise InputError(str(run), what, remedy)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse to start over; take over the signals.

        After Lightning, whose own handlers would run collectives inside a handler.
        """
        self._refuse_to_start_over(trainer, pl_module)
        self.stop_requested, self._speaks = False, trainer.is_global_zero
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)

    def _request(self, number: int, frame: Any) -> None:
        if self.stop_requested:
            raise KeyboardInterrupt
        self.stop_requested = True
        if self._speaks:
            print("\nstopping: finishing this step and saving it (again to stop at once)", flush=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: object, **__: object) -> None:
        """Save if it is time to. One rank's signal stops all of them, after the same step."""
        stop = trainer.strategy.reduce_boolean_decision(self.stop_requested, all=False)
        due = self.every_n_steps and pl_module.step % self.every_n_steps == 0
        if due or pl_module.finished or stop or pl_module.halt:
            self.save(trainer, pl_module.step)
        if stop:
            self.stop_requested = trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the signals back also when the run breaks off."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def save(self, trainer: L.Trainer, step: int) -> None:
        """Write the checkpoint beside its name, rename it, then drop older ones."""
        path = checkpoint_path(Path(trainer.default_root_dir), step)
        path.parent.mkdir(parents=True, exist_ok=True)
        if trainer.is_global_zero:
            for left_over in path.parent.glob(".step-*.ckpt.tmp"):  # of a kill in the middle of a save
                _remove(left_over)
        if isinstance(trainer.strategy, Fsdp2):
            trainer.save_checkpoint(path)  # the strategy does the same for a folder
        else:
            beside = path.with_name(f".{path.name}.tmp")
            try:
                trainer.save_checkpoint(beside)
                with beside.open("rb") as file:
                    os.fsync(file.fileno())
                beside.replace(path)
            finally:  # half a file would keep a full disk full
                beside.unlink(missing_ok=True)
        if trainer.is_global_zero:
            saved = sorted(path.parent.glob("step-*.ckpt"), key=_order)
            for old in [other for other in saved if _order(other) <= _order(path)][: -self.keep]:
                _remove(old)  # later ones are of a run that was taken back to an earlier step: not ours to remove


def _left(run: Path, *patterns: str) -> str:
    """The first thing found, by its name in the folder; nothing is the empty text."""
    return next((str(path.relative_to(run)) for pattern in patterns for path in sorted(run.glob(pattern))), "")


def _order(checkpoint: Path) -> tuple[int, str]:
    return len(checkpoint.name), checkpoint.name  # by step, also beyond six digits


def _remove(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
