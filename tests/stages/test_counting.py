"""Steps are ours: Trainer limits cut them, a Trainer that wants more epochs gets no more, Lightning's own count is refused."""

import json

import lightning as L
import pytest
import stage_runs as runs

from tulu_lightning.callbacks.checkpoints import Checkpoints
from tulu_lightning.callbacks.records import Records
from tulu_lightning.callbacks.refresh import RolloutRefresh
from tulu_lightning.errors import InputError
from tulu_lightning.stages.sft import SFT


def train(folder, stage, data, *callbacks, **settings):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    every = [Records(), *callbacks, Checkpoints(every_n_steps=0)]
    trainer = L.Trainer(accelerator="cpu", default_root_dir=folder, callbacks=every, **{**quiet, **settings})
    trainer.fit(stage, data)
    return stage


@pytest.mark.parametrize("epochs", [1, 3, -1])
def test_the_plan_ends_the_run_whatever_the_trainer_wants(tmp_path, epochs):
    stage, data = runs.STAGES["sft"]
    finished = train(tmp_path, stage(), data(), max_epochs=epochs)
    assert isinstance(finished, SFT)
    assert finished.step == finished.trainer.datamodule.total_steps
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, finished.step + 1))


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_limit_train_batches_counts_whole_steps_and_the_run_is_finished_and_saved(tmp_path, name):
    stage, data = runs.STAGES[name]
    refresh = [RolloutRefresh()] if name == "ppo" else []
    finished = train(tmp_path, stage(), data(), *refresh, max_epochs=1, limit_train_batches=2)
    assert finished.step == 2
    assert finished.finished
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002.ckpt"]


def test_lightnings_own_step_limit_is_refused_with_ours(tmp_path):
    stage, data = runs.STAGES["sft"]
    with pytest.raises(InputError, match=r"trainer.max_steps.*data.init_args.max_steps"):
        train(tmp_path, stage(), data(), max_steps=3)
