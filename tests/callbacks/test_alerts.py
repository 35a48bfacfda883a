"""Alerts of a real run: in its log as they begin, once, and the same from its records."""

import json

import pytest
import stage_runs as runs
from promotion_runs import Scripted
from stage_faults import Interrupt

from tulu_lightning.callbacks.alerts import Alerts
from tulu_lightning.callbacks.checkpoints import checkpoint_path
from tulu_lightning.core.alerts import AlertLimits, alerts

LIMITS = AlertLimits(window=2, truncation=0.5)


def told(said):
    return [line for line in said.splitlines() if line.startswith("alert at step ")]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_random_policy_that_never_stops_is_told_of_once_also_over_a_resume(tmp_path, capsys):
    # Six new tokens: a random model over hundreds of tokens hardly ever ends a response before.
    runs.fit(runs.grpo(), runs.even_data(max_steps=4), tmp_path, callbacks=[Alerts(LIMITS), Interrupt(3)])
    first = capsys.readouterr().out
    kept = checkpoint_path(tmp_path, 3)
    runs.fit(runs.grpo(), runs.even_data(max_steps=4), tmp_path, callbacks=[Alerts(LIMITS)], ckpt_path=kept)
    second = capsys.readouterr().out
    rows = records(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    found = [alert for alert in alerts(rows, limits=LIMITS) if alert.rule == "truncation"]
    assert [(alert.first, alert.last) for alert in found] == [(1, 4)]
    shares = [1 - row["stop_share"] for row in rows]
    windows = [(shares[i] + shares[i + 1]) / 2 for i in range(3)]
    assert found[0].numbers["share"] == max(windows)
    (line,) = [line for line in told(first) if "truncation" in line]
    assert line.startswith(f"alert at step 2: truncation: {windows[0]:.0%} of the responses reached the token limit")
    assert not [line for line in told(second) if "truncation" in line]


def test_held_out_scores_that_stand_still_are_read_as_they_come(tmp_path, capsys):
    evaluate = Scripted({"before": 60, "step_000004": 60, "after": 50}, every_n_steps=4)
    always = AlertLimits(window=2, errors=0.0)
    watch = runs.fit(
        runs.dpo(lr=1e-3), runs.preference_data(max_steps=5), tmp_path, callbacks=[evaluate, Alerts(always)]
    )
    margins = [row["margin"] for row in watch.history]
    scores = [{"step": step, "task": "held-out", "score": right / 200} for step, right in ((0, 60), (4, 60), (5, 50))]
    found = [a for a in alerts(records(tmp_path), scores, always) if a.rule == "reward without score"]
    rose = sum(margins[2:4]) >= sum(margins[:2]) or sum(margins[3:5]) >= sum(margins[:2])
    assert bool(found) == rose
    said = [line for line in told(capsys.readouterr().out) if "reward without score" in line]
    assert len(said) == len(found)
    assert all("the score on held-out" in line for line in said)


# Resuming ----------------------------------------------------------------------------------------------------------

RISING = AlertLimits(window=2, errors=0.0)
RIGHT = {"before": 120, "step_000002": 80, "step_000004": 130, "after": 90}  # of 200


class Rising(runs.DPO):
    """Its margin rises by one a step, whatever is trained."""

    def finish_step(self, metrics):
        super().finish_step({**metrics, "margin": float(self.step)})


def watched(folder, right, stop=None, kept=None):
    also = [Scripted(right, every_n_steps=2), Alerts(RISING), *([] if stop is None else [Interrupt(stop)])]
    stage = Rising(runs.Backbone(runs.TINY), runs.AdamW(lr=1e-4), runs.DPOLoss())
    runs.fit(stage, runs.preference_data(max_steps=6), folder, kept, callbacks=also, every_n_steps=1)


def of_scores(capsys):
    return [line for line in told(capsys.readouterr().out) if "reward without score" in line]


@pytest.fixture
def whole(tmp_path, capsys):
    """What a run that is never stopped says. Two windows of two steps are there from step 4 on, when the score is 0.65."""
    watched(tmp_path / "whole", RIGHT)
    said = of_scores(capsys)
    assert len(said) == 1
    assert said[0].startswith("alert at step 6: ")
    assert "the score on held-out fell from 0.600 to 0.450 between steps 0 and 6" in said[0]
    return said


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_resumed_run_holds_its_scores_against_those_of_the_start(stop, whole, tmp_path, capsys):
    watched(tmp_path, RIGHT, stop)
    assert of_scores(capsys) == []
    watched(tmp_path, RIGHT, kept=checkpoint_path(tmp_path, stop))
    assert of_scores(capsys) == whole


@pytest.mark.parametrize("stop", [4, 5])
def test_what_was_told_before_the_stop_is_not_told_again(stop, tmp_path, capsys):
    falling = {**RIGHT, "step_000004": 100}
    watched(tmp_path, falling, stop)
    (line,) = of_scores(capsys)
    assert "fell from 0.600 to 0.500 between steps 0 and 4" in line
    watched(tmp_path, falling, kept=checkpoint_path(tmp_path, stop))
    assert of_scores(capsys) == [], "it still holds at step 6, as in a run that goes through"


@pytest.mark.parametrize(("step", "moment"), [(4, "step_000004"), (6, "after")])
def test_scores_that_a_kill_came_before_are_told_of_when_they_are_made(step, moment, tmp_path, capsys):
    falling = {**RIGHT, "step_000004": 100 if step == 4 else 130}
    watched(tmp_path, falling, step if step < 6 else None)
    said = of_scores(capsys)
    assert len(said) == 1
    (tmp_path / "scores" / f"{moment}.json").unlink()
    watched(tmp_path, falling, kept=checkpoint_path(tmp_path, step))
    assert of_scores(capsys) == said
