"""A run stops itself, saved, where going on is of no use: the sampler is not the trainer, or all rewards are equal."""

import json
from pathlib import Path

import pytest
import torch
from stage_runs import even_data, fit, grpo, prompt_data, weights
from test_resume import assert_same

from tulu_lightning import cli
from tulu_lightning.callbacks.checkpoints import checkpoint_path
from tulu_lightning.callbacks.refresh import RolloutRefresh
from tulu_lightning.errors import RunStopped
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.stages.guards import Watchman
from tulu_lightning.stages.ppo import Guards

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def apart(monkeypatch):
    """The sampler reports log-probs that are off by one nat, as no canary would let it: k3 = exp(-1) - 1 + 1 = 0.37 where log-probs are too high."""
    generate = LocalEngine.generate

    def off(self, *args, **more):
        result = generate(self, *args, **more)
        return [[c._replace(logprobs_L=c.logprobs_L + 1.0) for c in group] for group in result]

    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "generate", off)
        yield patch


def test_a_sampler_that_stays_apart_stops_the_run_with_numbers_causes_and_a_checkpoint(apart, tmp_path):
    stage = grpo(guards=Guards(mismatch_patience=2))
    with pytest.raises(RunStopped) as caught:
        fit(stage, even_data(max_steps=5), tmp_path, callbacks=[RolloutRefresh(canary=False)], refresh=False)
    said = str(caught.value)
    assert "mismatch_kl was above 0.1 for 2 steps in a row, up to step 2 (mismatch_kl 0.368, mismatch_mean 1" in said
    for cause in ("rollout.engine.dtype", "RolloutRefresh", "rollout.temperature", "tokenizer", "guards.mismatch_kl"):
        assert cause in said
    assert stage.step == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2, "the step is recorded"
    apart.undo()
    go_on = grpo(guards=Guards(mismatch_kl=0.5))
    fit(go_on, even_data(max_steps=5), tmp_path, ckpt_path=checkpoint_path(tmp_path, 2))
    assert go_on.step == 5, "limits are not part of what a run is"


def test_a_limit_of_null_lets_it_run(apart, tmp_path):
    stage = grpo(guards=Guards(mismatch_kl=None, mismatch_patience=1))
    watch = fit(stage, even_data(max_steps=2), tmp_path, callbacks=[RolloutRefresh(canary=False)], refresh=False)
    assert [step["mismatch_kl"] for step in watch.history] == pytest.approx([0.3679] * 2, abs=1e-3)
    assert [step["correction_mean"] for step in watch.history] == pytest.approx([0.3679] * 2, abs=1e-3)


def metrics(kl):
    return {"mismatch_kl": kl, "version": 3.0, "outcome_right": 0.0, "outcome_wrong": 4.0, "stop_share": 0.5}


def test_only_steps_in_a_row_count():
    watchman = Watchman(Guards(mismatch_kl=0.1, mismatch_patience=2, equal_rewards=3))
    assert [watchman.after(i, metrics(kl), (0.0, 1.0)) for i, kl in enumerate([0.2, 0.05, 0.2])] == [""] * 3
    assert "for 2 steps in a row, up to step 9" in watchman.after(9, metrics(float("nan")), (0.0, 1.0))
    watchman = Watchman(Guards(equal_rewards=2))
    assert [watchman.after(i, metrics(0.0), rewards) for i, rewards in enumerate([(5.0,), (1.0, 2.0), (3.0, 3.0)])] == [
        ""
    ] * 3
    said = watchman.after(4, metrics(0.0), (0.0, 0.0))
    assert "equal (0) for 2 steps in a row, up to step 4" in said
    assert "wrong 4; 50% of its responses stopped" in said


def test_one_response_a_step_is_held_against_the_step_before_also_over_a_stop():
    watchman = Watchman(Guards(equal_rewards=2))
    assert [watchman.after(i, metrics(0.0), (reward,)) for i, reward in enumerate([0.0, 10.0, 0.0, 10.0, 10.0])] == [
        ""
    ] * 5
    again = Watchman(Guards(equal_rewards=2))
    again.restore(watchman.state())
    assert "equal (10) for 2 steps in a row, up to step 5" in again.after(5, metrics(0.0), (10.0,))


def test_equal_rewards_stop_the_run_and_it_can_be_gone_on_with(tmp_path):
    whole = grpo(guards=Guards(equal_rewards=None))
    watch = fit(whole, prompt_data(max_steps=3), tmp_path / "whole")
    assert {step["reward"] for step in watch.history} == {0}
    stage = grpo(guards=Guards(equal_rewards=2))
    with pytest.raises(RunStopped, match=r"equal \(0\) for 2 steps in a row, up to step 2.*guards\.equal_rewards"):
        fit(stage, prompt_data(max_steps=3), tmp_path / "run")
    go_on = grpo(guards=Guards(equal_rewards=2))
    fit(go_on, prompt_data(max_steps=3), tmp_path / "run", ckpt_path=checkpoint_path(tmp_path / "run", 2))
    assert_same(weights(whole), weights(go_on))


def test_the_command_line_says_so_on_one_line_and_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["fit", "--config", str(CONFIGS / "ppo_tiny.yaml"), "--model.guards.equal_rewards=1"]
    command += ["--model.rollout.max_new_tokens=1"]
    assert cli.main(command) == cli.STOPPED == 1
    (last,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tulu: ")]
    assert last.startswith("tulu: stopped: all rewards were equal (-10) for 1 steps in a row, up to step 1")
    assert cli.main(command) == 1
    assert "resuming from" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in Path("runs/ppo_tiny/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    assert torch.load(checkpoint_path(Path("runs/ppo_tiny"), 2), weights_only=False)["tulu_stage"]["step"] == 2
