"""What happens to one rank of a run, in the middle of a step: configs name these callbacks by import path."""

import os
import signal
import time

import lightning as L

from tulu_lightning.models.sharding import Fsdp2


class Fault(L.Callback):
    """Does it in the backward pass of a step, while the other ranks wait for this one's gradients."""

    def __init__(self, step: int = 2, rank: int = 1) -> None:
        self.step, self.rank = step, rank

    def on_before_backward(self, trainer, pl_module, loss):
        if pl_module.step == self.step - 1 and trainer.global_rank == self.rank:
            self.strike()


class Killed(Fault):
    def strike(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Raises(Fault):
    def strike(self):
        raise ValueError("this rank has had enough")


class RaisesAndLingers(Raises):
    """Its clean-up waits for the others, who will not come."""

    def on_exception(self, trainer, pl_module, exception):
        if trainer.global_rank == self.rank:
            time.sleep(5)


class Hangs(Fault):
    def strike(self):
        time.sleep(3600)


class Impatient(Fsdp2):
    """Waits for the other ranks for eight seconds."""

    def __init__(self) -> None:
        super().__init__(timeout_minutes=8 / 60)


class AllRaise(L.Callback):
    """A fault of the program: every rank finds it in the same step."""

    def on_train_batch_end(self, trainer, pl_module, *_, **__):
        raise ValueError("nobody can go on")
