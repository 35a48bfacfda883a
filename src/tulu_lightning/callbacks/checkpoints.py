"""When a run is saved, and how it stops when asked to.

A save goes to a hidden name beside its own and is renamed, so a name is either whole or not there. Ctrl-C, SIGTERM or
SIGUSR1 sets a flag; the step in progress is finished, saved, and the run ends resumable. A second Ctrl-C does not wait.

A run folder holds one run. Its `identity.json` says which, and a start with other settings, or one that would begin
anew over what is there, is refused.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import SingleDeviceStrategy

from tulu_lightning.callbacks import random_state
from tulu_lightning.callbacks.stopping import Stopping
from tulu_lightning.checkpoints.identity import check_run, read_identity, versions, write_identity
from tulu_lightning.checkpoints.space import check_space
from tulu_lightning.data.base import StepData
from tulu_lightning.errors import InputError
from tulu_lightning.files import remove, remove_whole, write_whole
from tulu_lightning.models.saved import FORMAT, KEY, Header, step_of
from tulu_lightning.models.sharding import Fsdp2
from tulu_lightning.models.single_file import SingleFile

__all__ = ["Checkpoints", "checkpoint_path"]

LEFT = ("checkpoints/step-*.ckpt", "scores/after.json", "summary.json")
"""What only a run that got somewhere leaves in its folder; a start from step 0 would mix it with its own."""
SCORES = "scores/before.json"
MANIFEST = "data_manifest.json"
"""What the run is trained on; see `data.manifest`."""
RANDOM = "tulu_random"


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` finished steps lies."""
    return run / "checkpoints" / f"step-{step:06d}.ckpt"


class Checkpoints(L.Callback):
    """Save every so many of *our* steps, at the end, and when told to stop.

    Args:
        every_n_steps: steps between saves; 0 saves only at the end and when stopping.
        keep: how many of the newest to keep.
        background: copy the state and go on training while it is written; the next save, and the run's end, wait. Takes
            room on the host for a second copy of what a checkpoint holds. `strategy: Fsdp2` has it as `async_save`.
        accept_changes: names of settings that may differ from those the run was started with, e.g. `[optimizer.lr]`.
            `tulu fit --accept_changes` sets it.
        requeue: after SIGTERM or SIGUSR1 under SLURM, have the job started again (`scontrol requeue`).
        check_disk: refuse to start when the disk has no room for what the run will write.

    Raises:
        InputError: `every_n_steps` is below 0, `keep` below 1, or `requeue` outside of a SLURM job.

    Attributes:
        config: the command's config, which checkpoints carry; None from Python.
        resumes: what the run goes on from says of itself, if that is known before the weights load.
    """

    config: dict[str, Any] | None = None
    resumes: tuple[str, Header] | None = None

    def __init__(
        self,
        every_n_steps: int = 100,
        keep: int = 1,
        background: bool = False,
        accept_changes: Sequence[str] = (),
        requeue: bool = False,
        check_disk: bool = True,
    ) -> None:
        super().__init__()
        if every_n_steps < 0:
            raise InputError("Checkpoints.every_n_steps", f"is {every_n_steps}", "Use 0 to save only at the end.")
        if keep < 1:
            raise InputError("Checkpoints.keep", f"is {keep}", "Use at least 1.")
        if requeue and not (os.environ.get("SLURM_JOB_ID") and shutil.which("scontrol")):
            what = "is true, and this is no SLURM job (SLURM_JOB_ID), or there is no scontrol"
            raise InputError("Checkpoints.requeue", what, "Leave it out, or start the run under SLURM.")
        self.every_n_steps, self.keep, self.background = every_n_steps, keep, background
        self.accept_changes, self.requeue, self.check_disk = list(accept_changes), requeue, check_disk
        self.stopping = Stopping()
        self._random: list[dict[str, Any]] = []

    @property
    def stop_requested(self) -> bool:
        """The run was asked to stop."""
        return self.stopping.requested

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a folder that holds another run, before its config is written there and any weights load."""
        self._prepare_saving(trainer)
        if stage != "fit":
            return
        run = Path(trainer.default_root_dir)
        identity = pl_module.identity()
        if self.resumes is not None:
            path, header = self.resumes
            check_run(path, header.identity, pl_module)
        if _left(run, *LEFT, SCORES):
            check_run(str(run), read_identity(run), pl_module)
        if self.check_disk and trainer.is_global_zero:
            exports = max(getattr(c, "most_exports", lambda _: 1)(pl_module) for c in trainer.callbacks)  # type: ignore[attr-defined]
            check_space(run, pl_module, self.every_n_steps, self.keep, exports)
        trainer.strategy.barrier("identity")  # nobody reads what the first rank writes next
        if trainer.is_global_zero:
            write_identity(run, identity)
            if isinstance(data := trainer.datamodule, StepData):  # type: ignore[attr-defined]
                write_whole(run / MANIFEST, json.dumps(data.manifest(), indent=1, ensure_ascii=False))

    def _prepare_saving(self, trainer: L.Trainer) -> None:
        """Have the strategy write whole checkpoints, and leave signals and what they mean to this callback."""
        strategy = trainer.strategy
        if isinstance(strategy, Fsdp2):
            strategy.async_save = strategy.async_save or self.background
            strategy.published = self._drop_older
        elif isinstance(strategy, SingleDeviceStrategy):
            strategy.checkpoint_io = SingleFile(self.background, self._drop_older)
        # Lightning's own handler runs a collective inside itself, and each step would begin with one about what it saw.
        connector: Any = trainer._signal_connector
        connector._sigterm_notifier_fn = lambda *_: None
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

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
        """Refuse to start over; take over the signals."""
        self._refuse_to_start_over(trainer, pl_module)
        self.stopping.take_over(trainer.is_global_zero)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: object, **__: object) -> None:
        """Before the first step of a resumed run: the random states as they were after the last one that was saved."""
        states, self._random = self._random, []
        if states:
            random_state.restore(states, trainer.global_rank)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: object, **__: object) -> None:
        """Save if it is time to. One rank's signal stops all of them, after the same step."""
        stop = self.stopping.agreed(trainer.strategy)
        due = self.every_n_steps and pl_module.step % self.every_n_steps == 0
        if due or pl_module.finished or stop or pl_module.halt:
            self.save(trainer, pl_module.step)
        if stop:
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Wait for what is being written; give the signals back."""
        self._wait(trainer)
        self.stopping.give_back()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Give the signals back also when the run breaks off."""
        self.stopping.give_back()

    # What is saved ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add what the checkpoint says of itself, and the random states of all ranks."""
        checkpoint[KEY] = {
            "format": FORMAT,
            "stage": type(pl_module).__name__,
            "step": pl_module.step,
            "ranks": trainer.world_size,
            "mesh": getattr(trainer.strategy, "mesh", None),
            "versions": versions(),
            "identity": pl_module.identity(),
            "config": self.config,
        }
        checkpoint[RANDOM] = random_state.everyones()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the random states until the first step."""
        self._random = checkpoint.get(RANDOM, [])

    def save(self, trainer: L.Trainer, step: int) -> None:
        """Write the checkpoint beside its name and rename it; older ones go once it is there."""
        path = checkpoint_path(Path(trainer.default_root_dir), step)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._wait(trainer)
        if trainer.is_global_zero:
            for left_over in path.parent.glob(".step-*.tmp"):  # of a kill in the middle of a save
                remove(left_over)
        trainer.save_checkpoint(path)

    @staticmethod
    def _wait(trainer: L.Trainer) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, Fsdp2):
            strategy.wait_for_saves()
        elif isinstance(strategy.checkpoint_io, SingleFile):
            strategy.checkpoint_io.wait()

    def _drop_older(self, path: Path) -> None:
        """Keep the newest, the one that was just published among them."""
        last = step_of(path) or 0
        saved = {other: step for other in path.parent.glob("step-*.ckpt") if (step := step_of(other)) is not None}
        # Later ones are of a run that was taken back to an earlier step, other names a user's: not ours to remove.
        for old in sorted((other for other in saved if saved[other] <= last), key=saved.__getitem__)[: -self.keep]:
            remove_whole(old)


def _left(run: Path, *patterns: str) -> str:
    """The first thing found, by its name in the folder; nothing is the empty text."""
    return next((str(path.relative_to(run)) for pattern in patterns for path in sorted(run.glob(pattern))), "")
