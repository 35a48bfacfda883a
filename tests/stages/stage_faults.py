"""Callbacks that do to a run what users and machines do; configs name them by import path."""

import json
import os
import random
import resource
import signal
import time

import lightning as L
import numpy as np
import torch


class Interrupt(L.Callback):
    """Ctrl-C while a step is being computed, on one rank."""

    def __init__(self, step: int, rank: int = 0, number: int = 2) -> None:
        self.step, self.rank, self.number = step, rank, number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.step == self.step - 1 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


class DieWhileSaving(L.Callback):
    """The machine stops while the checkpoint of a step is written: when its first file is to be synced, or a later one."""

    def __init__(self, step: int, rank: int = 0, file: int = 1) -> None:
        self.step, self.rank, self.left = step, rank, file

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if pl_module.step == self.step and trainer.global_rank == self.rank:
            os.fsync = self._fsync

    def _fsync(self, descriptor):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


class SmallDisk(L.Callback):
    """Files may not grow beyond some bytes while the checkpoint of a step is written."""

    def __init__(self, step: int, limit: int) -> None:
        self.step, self.limit = step, limit

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if pl_module.step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))


class LateWrite(L.Callback):
    """A save in the background waits for the next step before it writes the first byte; the last one need not."""

    def on_fit_start(self, trainer, pl_module):
        write, strategy = trainer.strategy._write, trainer.strategy

        def late(*args):
            saved = pl_module.step
            for _ in range(500):
                if pl_module.step > saved or pl_module.finished:
                    break
                time.sleep(0.01)
            if pl_module.step > saved:
                print(f"the write of step {saved} began after step {pl_module.step}", flush=True)
            write(*args)

        strategy._write = late


class Draws(L.Callback):
    """Draws from every generator of the process in each step, as a callback of a user's own might."""

    def __init__(self) -> None:
        self.drawn = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))


class KeepRows(L.Callback):
    """Writes which rows this rank computes in each step, one line a step, to `rows-<rank>.jsonl`."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        path = os.path.join(trainer.default_root_dir, f"rows-{trainer.global_rank}.jsonl")
        mine = [row for pack in batch.packs for row in pack.rows]
        record = {"step": batch.step, "mine": mine, "step_rows": batch.rows, "passes": len(batch.packs)}
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
