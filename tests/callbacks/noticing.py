"""A callback that writes down what a disturbed run would have otherwise."""

import json
import random
from pathlib import Path

import lightning as L
import numpy as np
import torch

__all__ = ["Notice"]


class Notice(L.Callback):
    """For each step: the rows of this rank, and numbers drawn of every generator; one file a rank."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        rows = [list(map(int, pack.rows)) for pack in getattr(batch, "packs", ())]
        path = Path(trainer.default_root_dir, f"noticed-{trainer.global_rank}.jsonl")
        with path.open("a") as file:
            file.write(json.dumps({"step": pl_module.step, "drawn": drawn, "rows": rows}) + "\n")
