"""Steps are ours: Trainer limits cut them, a Trainer that wants more epochs gets no more, Lightning's own count is refused."""

import json

import lightning as L
import pytest
import stage_runs as runs
import torch

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


def test_a_run_cut_by_limit_train_batches_goes_on_to_the_plans_end_without_it(tmp_path):
    """3 of 6 steps, then the rest: the same weights as in one go."""

    def run(folder, checkpoint=None, **settings):
        stage, data = runs.sft(), runs.sft_data(max_steps=6)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        callbacks = [Records(), Checkpoints(every_n_steps=0, keep=9)]
        trainer = L.Trainer(
            accelerator="cpu", default_root_dir=folder, callbacks=callbacks, max_epochs=1, **quiet, **settings
        )
        trainer.fit(stage, data, ckpt_path=checkpoint)
        return stage

    assert run(tmp_path / "cut", limit_train_batches=3).step == 3
    resumed = run(tmp_path / "cut", tmp_path / "cut" / "checkpoints" / "step-000003.ckpt")
    whole = run(tmp_path / "whole")
    assert resumed.step == whole.step == 6
    for name, tensor in runs.weights(whole).items():
        assert torch.equal(runs.weights(resumed)[name], tensor), name


def test_fast_dev_run_is_refused_by_its_own_name(tmp_path):
    stage, data = runs.STAGES["sft"]
    with pytest.raises(InputError, match=r"trainer.fast_dev_run.*data.init_args.max_steps"):
        train(tmp_path, stage(), data(), fast_dev_run=True)


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_overfitting_by_lightnings_sampler_is_refused_by_its_own_name(tmp_path, kind):
    stage, data = runs.STAGES[kind]
    with pytest.raises(InputError, match=r"trainer.overfit_batches: is 2.*in place of the step plan.*limit.*epochs"):
        train(tmp_path, stage(), data(), overfit_batches=2)


def test_batches_without_their_data_module_are_refused(tmp_path):
    trainer = L.Trainer(accelerator="cpu", default_root_dir=tmp_path, max_epochs=1, logger=False)
    with pytest.raises(InputError, match="datamodule=data"):
        trainer.fit(runs.sft(), train_dataloaders=runs.sft_data().train_dataloader())
