"""Held-out scores during training, which training does not notice; and the table of rollouts."""

import json
import random
from dataclasses import replace

import lightning as L
import numpy as np
import pytest
import stage_runs as runs
import torch
import toy_tasks
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tulu_lightning.callbacks.checkpoints import Checkpoints, checkpoint_path
from tulu_lightning.callbacks.evaluate import Evaluate
from tulu_lightning.callbacks.records import Records, rollout_table
from tulu_lightning.callbacks.refresh import RolloutRefresh
from tulu_lightning.callbacks.scoring import Evaluation
from tulu_lightning.callbacks.suite import Suite, moments, read_moment
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
    logged = events.Scalars("heldout_accuracy")
    assert [accuracy.step for accuracy in logged] == [0, 1, 2]
    for accuracy, moment in zip(logged, ("before", "step_000001", "after"), strict=True):
        scores = Scores.from_json(tmp_path / "scores" / f"{moment}.json")
        assert accuracy.value == pytest.approx(scores.accuracy)
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


# A suite of tasks --------------------------------------------------------------------------------------------------


class Draws(L.Callback):
    """Numbers from every generator, drawn at the start of each step."""

    def __init__(self):
        self.drawn = []

    def on_train_batch_start(self, *_):
        self.drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))


def disturb():
    """Rows of a data set that draws from every generator as it is read."""
    drawn = random.random(), np.random.rand(), torch.rand(3)
    assert len(drawn) == 3
    return toy_tasks.all_rows()


def suite(**settings):
    return Suite(["toy_tasks.ASKED", "toy_tasks.RANKED"], **{"limit": 6, **settings})


def test_a_suite_changes_nothing_of_the_training_and_is_written_and_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_tasks, "ASKED", replace(toy_tasks.ASKED, rows=disturb))
    torch.manual_seed(5)
    seeds = random.getstate(), np.random.get_state()
    kept = []
    for name, also in (("alone", []), ("watched", [Evaluate(suite=suite(), every_n_steps=1)])):
        random.setstate(seeds[0])
        np.random.set_state(seeds[1])
        draws, stage = Draws(), runs.sft()
        watch = runs.fit(stage, runs.sft_data(max_steps=3), tmp_path / name, callbacks=[*also, draws])
        kept.append((draws.drawn, watch.rows, runs.weights(stage)))
    (drawn, rows, weights), (drawn_too, rows_too, weights_too) = kept
    assert drawn == drawn_too
    assert rows == rows_too
    assert all(torch.equal(w, weights_too[name]) for name, w in weights.items())

    scores = tmp_path / "watched" / "scores"
    assert moments(tmp_path / "watched") == ["before", "step_000001", "step_000002", "after"]
    assert sorted(path.name for path in (scores / "step_000001").iterdir()) == ["asked.json", "ranked.json"]
    result = json.loads((scores / "after" / "ranked.json").read_text())["summary"]
    tasks = {task.name: (task, items) for task, items in suite().read()}
    task, items = tasks["ranked"]
    assert (result["n"], result["settings"], result["version"]) == (6, task.settings(items), 2)
    low, high = result["interval"]
    assert low <= result["score"] <= high
    found = read_moment(tmp_path / "watched", "after")
    assert found["ranked"].score == pytest.approx(result["score"])
    assert found["ranked"].groups == ("0", "1", "0", "1", "0", "1")  # three of each twenty: 0, 12, 26 and 1, 13, 27


def test_scores_that_a_kill_came_before_are_made_up_for(tmp_path):
    class Killed(Evaluate):
        def on_train_batch_end(self, trainer, pl_module, *_, **__):
            if pl_module.step == 2:
                raise SystemExit("killed")

    def trainer(evaluate):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        return L.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path,
            callbacks=[Records(), Checkpoints(1, keep=9), evaluate], **quiet,
        )  # fmt: skip

    with pytest.raises(SystemExit):
        trainer(Killed(suite=suite(), every_n_steps=2)).fit(runs.sft(), runs.sft_data(max_steps=4))
    assert moments(tmp_path) == ["before"]
    kept = checkpoint_path(tmp_path, 2)
    trainer(Evaluate(suite=suite(), every_n_steps=2)).fit(runs.sft(), runs.sft_data(max_steps=4), ckpt_path=kept)
    assert moments(tmp_path) == ["before", "step_000002", "after"]
    other = Evaluate(suite=suite(limit=5))
    with pytest.raises(InputError, match=r"before/asked\.json: its scores are of other held-out prompts or sampling"):
        trainer(other).fit(runs.sft(), runs.sft_data(max_steps=4), ckpt_path=kept)


@pytest.fixture
def made(monkeypatch):
    """Names of the evaluations that were made, and not read from the disk."""
    names = []
    score = Evaluation.score

    def noted(self, engine, label, sheets):
        names.append(sheets.name)
        return score(self, engine, label, sheets)

    monkeypatch.setattr(Evaluation, "score", noted)
    return names


def finish(folder, kept=None):
    """A run of two steps, or what is left of it, scored on both kinds."""
    last = Evaluate([HELD_OUT], max_new_tokens=3, every_n_steps=1, suite=suite())
    runs.fit(runs.sft(), runs.sft_data(max_steps=2), folder, kept, callbacks=[last], every_n_steps=1)
    return last


def test_a_finished_run_is_not_scored_again(made, tmp_path):
    first = finish(tmp_path)
    assert made == ["before", "step_000001", "after"]
    again = finish(tmp_path, checkpoint_path(tmp_path, 2))
    assert made[3:] == []
    assert again.latest == (2, "after")
    assert again.scores["after"] == first.scores["after"]
    (tmp_path / "scores" / "after" / "ranked.json").unlink()  # killed between the two
    finish(tmp_path, checkpoint_path(tmp_path, 2))
    assert made[3:] == ["after"]


@pytest.mark.parametrize(("step", "moment"), [(1, "step_000001"), (2, "after")])
@pytest.mark.parametrize("name", [".json", "/asked.json"])
def test_scores_of_other_weights_are_made_again(name, step, moment, made, tmp_path):
    first = finish(tmp_path)
    path = tmp_path / "scores" / f"{moment}{name}"
    key = "weights" if name == ".json" else "model_digest"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, key: "0" * 64}))
    finish(tmp_path, checkpoint_path(tmp_path, step))
    assert made[3:] == [moment], "and the other moment of the same weights is kept"
    assert json.loads(path.read_text())[key] == record[key]
    assert first.scores[moment] == read_moment(tmp_path, moment)


# Bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"every_n_steps": -1, "sources": []}, r"every_n_steps: is -1"),
        ({}, "Give sources, a suite, or both"),
        ({"sources": []}, r"max_new_tokens: is None\. Give the cap"),
        ({"suite": Suite(["gsm8k"]), "max_new_tokens": 4}, "without sources no prompt reads it"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Evaluate(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tasks": ["gsm8"]}, "there is no task or suite 'gsm8'. Did you mean 'gsm8k'"),
        ({"tasks": ["tulu3_de"]}, "Did you mean 'tulu3_dev'"),
        ({"tasks": ["toy_tasks.NONE"]}, "there is no 'toy_tasks.NONE'"),
        ({"tasks": ["toy_tasks.json"]}, "is a module"),
        ({"tasks": ["gsm8k"], "limits": {"mathh": 3}}, "a limit for 'mathh'"),
        ({"tasks": []}, "tasks: is empty"),
        ({"tasks": ["gsm8k"], "limit": 0}, "limit: is 0"),
        ({"tasks": ["gsm8k"], "limits": {"gsm8k": 0}}, r"limits\.gsm8k: is 0"),
        ({"tasks": ["gsm8k"], "max_new_tokens": 0}, "max_new_tokens: is 0"),
        ({"tasks": ["gsm8k"], "data": {"gsm8k": "nowhere.jsonl"}}, "there is no such file for the data set gsm8k"),
    ],
)
def test_a_suite_that_cannot_be_asked_is_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Suite(**settings).read()


def test_a_task_that_does_not_fit_the_model_is_refused_before_its_weights_load(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_tasks, "ASKED", replace(toy_tasks.ASKED, max_new_tokens=4096))
    with pytest.raises(InputError, match=r"task asked: the longest prompt, \S+, has \d+ tokens and answers up to 4096"):
        runs.fit(runs.sft(), runs.sft_data(max_steps=1), tmp_path, callbacks=[Evaluate(suite=suite())])
    capped = Evaluate(suite=suite(max_new_tokens=2))
    assert capped.suite.read()[0][0].max_new_tokens == 2
