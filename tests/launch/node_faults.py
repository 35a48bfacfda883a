"""What happens to one machine of a run, in the middle of a step: configs name these callbacks by import path."""

import os
import signal
import time
from pathlib import Path

import lightning as L

from tulu_lightning.models import waiting
from tulu_lightning.models.sharding import Fsdp2


class Watchful(Fsdp2):
    """Gives up a machine after six seconds without a sign of life."""

    def __init__(self) -> None:
        super().__init__()
        waiting.SILENCE = 6.0


class TorchrunKilled(L.Callback):
    """A machine's torchrun is killed; its rank lives, and waits in the step for somebody to notice."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(self, trainer, pl_module, *_, **__):
        if pl_module.step == 2 and trainer.global_rank == self.rank:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(3600)


class Marks(L.Callback):
    """Leaves a file when a step is done, and takes its time: something is done to the run meanwhile."""

    def __init__(self, path: str, step: int = 2, seconds: float = 0.0) -> None:
        self.path, self.step, self.seconds = path, step, seconds

    def on_train_batch_end(self, trainer, pl_module, *_, **__):
        if pl_module.step == self.step:
            Path(f"{self.path}-{trainer.global_rank}").touch()
            time.sleep(self.seconds)
