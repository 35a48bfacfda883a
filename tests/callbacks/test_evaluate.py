"""Held-out scores during training, which training does not notice; and the table of rollouts."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "stages"))

import lightning as L
import stage_runs as runs
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tulu_lightning.callbacks.evaluate import Evaluate
from tulu_lightning.callbacks.records import Records, rollout_table
from tulu_lightning.callbacks.refresh import RolloutRefresh
from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.heldout import Scores

HELD_OUT = Source("held out", rows="tulu_lightning.assets.arithmetic.heldout_rows", args={"count": 6})


def evaluate(every):
    return Evaluate([HELD_OUT], max_new_tokens=3, every_n_steps=every)


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_scores_in_between_change_nothing_of_the_training(name, tmp_path):
    build, data = runs.STAGES[name]
    alone, watched = build(), build()
    runs.fit(alone, data(max_steps=4), tmp_path / "alone")
    before = torch.random.get_rng_state()
    runs.fit(watched, data(max_steps=4), tmp_path / "watched", callbacks=[evaluate(2)])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(w, runs.weights(alone)[key]) for key, w in runs.weights(watched).items())
    written = sorted(path.name for path in (tmp_path / "watched" / "scores").iterdir())
    assert written == ["after.json", "before.json", "step_000002.json"], "after the last step there is after.json"
    scores = Scores.from_json(tmp_path / "watched" / "scores" / "step_000002.json")
    assert (scores.n, scores.weights_version) == (6, 2)


def test_the_logger_gets_held_out_accuracy_and_a_table_of_rollouts(tmp_path):
    stage = runs.grpo()
    logger = TensorBoardLogger(tmp_path, name="", version="")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    callbacks = [Records(rollouts_per_step=3), RolloutRefresh(), evaluate(1)]
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=logger, default_root_dir=tmp_path, callbacks=callbacks, **quiet
    )
    trainer.fit(stage, runs.even_data(max_steps=2))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (accuracy,) = events.Scalars("heldout_accuracy")
    assert accuracy.step == 1
    assert accuracy.value == pytest.approx(Scores.from_json(tmp_path / "scores" / "step_000001.json").accuracy)
    assert [event.step for event in events.Tensors("rollouts/text_summary")] == [1, 2]
    (text,) = events.Tensors("rollouts/text_summary")[-1].tensor_proto.string_val
    lines = text.decode().splitlines()
    assert lines[0] == "| source | prompt | response | target | outcome | score | reward | advantage | finish |"
    assert len(lines) == 2 + 3
    assert {"score/even", "kl", "entropy", "ess", "zero_signal_share"} <= set(events.Tags()["scalars"])


def test_a_table_shows_text_as_it_is():
    rows = [{"prompt": "a|b\n<b>*x*</b>", "response": "\ud800" + "y" * 500, "score": 1 / 3, "advantage": None}]
    (head, _, row) = rollout_table(rows).splitlines()
    assert head == "| prompt | response | score | advantage |"
    assert row == r"| a\|b<br>&lt;b&gt;\*x\*&lt;/b&gt; | ?" + "y" * 399 + "… | 0.333 |  |"


def test_an_interval_below_zero_is_refused():
    with pytest.raises(InputError, match=r"Evaluate\.every_n_steps: is -1"):
        evaluate(-1)
