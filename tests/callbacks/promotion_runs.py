"""Short real runs whose scores are made up, so that what is promoted is known beforehand."""

import json
from pathlib import Path

import lightning as L
import stage_runs as runs
import torch

from tulu_lightning.callbacks.checkpoints import Checkpoints
from tulu_lightning.callbacks.evaluate import Evaluate
from tulu_lightning.callbacks.records import Records
from tulu_lightning.callbacks.suite import scored
from tulu_lightning.data.sources import Source
from tulu_lightning.evaluation.heldout import Item, Scores

HELD_OUT = Source("held out", rows="tulu_lightning.assets.arithmetic.heldout_rows", args={"count": 6})
STEPS = 6


def scores(right, settings="s", n=200):
    """So many right of n, the first ones."""

    def item(row):
        good = row < right
        return Item(
            row=row,
            prompt=f"{row}?",
            target="1",
            response="1" if good else "2",
            outcome="right" if good else "wrong",
            score=float(good),
            tokens=1,
            finish="stop",
        )

    return Scores("held-out", 1, settings, 0, tuple(item(row) for row in range(n)))


class Scripted(Evaluate):
    """Writes made-up scores: how many of 200 are right at each moment."""

    def __init__(self, right, every_n_steps=0):
        super().__init__([HELD_OUT], 1, every_n_steps=every_n_steps)
        self.right = right

    def score(self, trainer, pl_module, moment):
        made = scores(self.right[moment])
        made.to_json(Path(trainer.default_root_dir, "scores", f"{moment}.json"))
        self._take(moment, pl_module.step, {"held-out": scored(made)})

    def _kept(self, run, moment):
        path = run / "scores" / f"{moment}.json"
        return ({"held-out": scored(Scores.from_json(path))} if path.exists() else {}), ""


def train(folder, evaluate, promote, ckpt_path=None, kind="sft", **trainer):
    """Six steps, with a checkpoint after each, which is saved before anything is scored."""
    torch.manual_seed(0)
    build, data = runs.STAGES[kind]
    more = {}
    if kind == "reward":
        more["validation"] = [Source("kept", rows=runs.ROWS + "pair_rows", args={"count": 8, "seed": 9})]
    callbacks = [Records(), Checkpoints(1, keep=9), *([evaluate] if evaluate else []), promote]
    made = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=callbacks,
        **trainer,
    )
    made.fit(build(), data(max_steps=STEPS, examples_per_step=4, **more), ckpt_path=ckpt_path)


def records(folder):
    """The decisions, by step."""
    return [json.loads(path.read_text()) for path in sorted((Path(folder) / "promotions").glob("step-*.json"))]
