"""Callbacks that do to a run what users and machines do; configs name them by import path."""

import json
import os
import signal

import lightning as L


class Interrupt(L.Callback):
    """Ctrl-C while a step is being computed, on one rank."""

    def __init__(self, step: int, rank: int = 0, number: int = 2) -> None:
        self.step, self.rank, self.number = step, rank, number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.step == self.step - 1 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


class DieWhileSaving(L.Callback):
    """The machine stops in the middle of writing the checkpoint of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if pl_module.step == self.step:
            folder = os.path.join(trainer.default_root_dir, "checkpoints")
            with open(os.path.join(folder, f".step-{self.step:06d}.ckpt.tmp"), "wb") as file:
                file.write(b"PK\x03\x04 half a file")
            os.kill(os.getpid(), signal.SIGKILL)


class KeepRows(L.Callback):
    """Writes which rows this rank computes in each step, one line a step, to `rows-<rank>.jsonl`."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        path = os.path.join(trainer.default_root_dir, f"rows-{trainer.global_rank}.jsonl")
        mine = [row for pack in batch.packs for row in pack.rows]
        record = {"step": batch.step, "mine": mine, "step_rows": batch.rows, "passes": len(batch.packs)}
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
