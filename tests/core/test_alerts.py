"""Alerts on made-up curves: each rule speaks where it should, names its evidence, and is silent on what is well."""

import math
import random

import pytest

from tulu_lightning.core.alerts import AlertLimits, Watcher, alerts
from tulu_lightning.errors import InputError

STEPS = 60


def run(**curves):
    """Rows of a healthy run, with some of its curves replaced by functions of the step (from 1)."""
    rng = random.Random(0)
    healthy = {
        "reward": lambda k: 1 + 0.05 * k + rng.gauss(0, 0.2),
        "length": lambda k: 100 + 0.3 * k + rng.gauss(0, 5),
        "entropy": lambda k: 0.5 + 0.5 * math.exp(-k / 30) + rng.gauss(0, 0.02),
        "zero_signal_share": lambda k: 0.3 + rng.gauss(0, 0.1),
        "stop_share": lambda k: 0.98 - 0.02 * rng.random(),
        "mismatch_kl": lambda k: 1e-3 * rng.random(),
        "explained_variance": lambda k: rng.gauss(0, 0.02),
    }
    return [{"step": k, **{name: f(k) for name, f in {**healthy, **curves}.items()}} for k in range(1, STEPS + 1)]


def score(*values):
    """Scores at the start, in the middle and at the end."""
    places = [0, STEPS // 2, STEPS]
    return [{"step": k, "task": "held-out", "score": v} for k, v in zip(places, values, strict=True)]


def only(found, rule):
    assert [alert.rule for alert in found] == [rule]
    return found[0]


def test_a_healthy_run_has_none():
    assert alerts(run(), score(0.3, 0.4, 0.5)) == []
    assert alerts([]) == []
    assert alerts([{"step": 1, "loss": 2.0}]) == []


def test_a_reward_that_rises_while_the_held_out_score_does_not():
    found = only(alerts(run(), score(0.5, 0.5, 0.45)), "reward without score")
    # Rewards 1 + 0.05 k: steps 1 to 10 have a mean of 1.275, the last ten 3.775; 0.2 of noise.
    assert found.numbers["early"] == pytest.approx(1.275, abs=0.2)
    assert found.numbers["late"] == pytest.approx(3.775, abs=0.2)
    assert (found.numbers["score_before"], found.numbers["score"]) == (0.5, 0.45)
    assert (found.first, found.last) == (1, 60)
    assert "the score on held-out fell from 0.500 to 0.450 between steps 0 and 60" in found.text
    assert "(steps 1 to 10)" in found.text


def test_a_reward_that_stays_says_nothing_of_a_score_that_falls():
    flat = run(reward=lambda k: 1 + 0.2 * (-1) ** k)
    assert alerts(flat, score(0.5, 0.4, 0.3)) == []


def test_each_task_is_held_against_its_own_start():
    scores = [{"step": k, "task": t, "score": s} for t, s0, s1 in (("a", 0.2, 0.3), ("b", 0.6, 0.5))
              for k, s in ((0, s0), (60, s1))]  # fmt: skip
    assert "the score on b fell" in only(alerts(run(), scores), "reward without score").text


def test_other_tasks_are_no_measure_of_a_reward_that_the_held_out_prompts_are_scored_for():
    other = [{"step": k, "task": "ifeval", "score": s} for k, s in ((0, 0.16), (60, 0.15))]
    assert alerts(run(), [*other, *score(0.3, 0.4, 0.5)]) == []
    assert "the score on held-out" in only(alerts(run(), [*other, *score(0.5, 0.5, 0.4)]), "reward without score").text
    assert "the score on ifeval" in only(alerts(run(), other), "reward without score").text


def test_a_margin_stands_for_the_reward_where_there_is_none():
    rows = [{"step": k, "margin": 0.1 * k} for k in range(1, 31)]
    scores = [{"step": k, "task": "held-out", "score": 0.5} for k in (0, 30)]
    assert "the training margin rose" in only(alerts(rows, scores), "reward without score").text


@pytest.mark.parametrize("slope", [2.0, -1.3])
def test_responses_that_grow_or_shrink(slope):
    found = only(alerts(run(length=lambda k: 100 + slope * k)), "length drift")
    # Means over ten steps: 100 + 5.5 slope at first, 100 + 55.5 slope at the end, where the drift is largest.
    assert found.numbers["ratio"] == pytest.approx((100 + 55.5 * slope) / (100 + 5.5 * slope))
    assert "steps 51 to 60" in found.text
    assert found.last == 60


def test_a_length_that_only_jumps_about_is_no_drift():
    assert alerts(run(length=lambda k: 400 if k in (20, 41) else 100)) == []


def test_an_entropy_that_collapses():
    found = only(alerts(run(entropy=lambda k: math.exp(-k / 10))), "entropy collapse")
    # The last window is e^-(k - 10)/10 of the first: below 0.2 from 10 ln 5 = 16.1 steps later on, so at step 27.
    assert found.first == 27 - 9
    assert found.numbers["share"] == pytest.approx(math.exp(-5), rel=1e-6)


def test_groups_without_signal():
    found = only(alerts(run(zero_signal_share=lambda k: 0.9 if 20 < k <= 40 else 0.1)), "dead groups")
    # A window of ten has a mean above 0.8 with nine of 0.9 and one of 0.1 (0.82): steps 29 to 41.
    assert (found.first, found.last) == (20, 41)
    assert found.numbers["share"] == pytest.approx(0.9)
    assert found.text == "90% of the groups had no signal in steps 21 to 30 (alert above 80%)"


def test_a_critic_that_explains_less_than_nothing_for_long():
    assert alerts(run(explained_variance=lambda k: -0.3 if k % 20 else 0.1)) == []
    found = only(alerts(run(explained_variance=lambda k: -0.3 if k > 30 else 0.1)), "negative explained variance")
    assert (found.first, found.last) == (31, 60)
    assert found.numbers["mean"] == pytest.approx(-0.3)


def test_responses_that_reach_the_limit():
    found = only(alerts(run(stop_share=lambda k: 1 - k / 100)), "truncation")
    # The mean over ten steps of k / 100 exceeds 0.25 from k = 30 (0.255) on.
    assert (found.first, found.last) == (21, 60)
    assert found.numbers["share"] == pytest.approx(0.555)


def test_a_sampler_that_is_not_the_trainer():
    found = only(alerts(run(mismatch_kl=lambda k: 0.05)), "mismatch KL")
    assert (found.first, found.last, found.limit) == (1, 60, 0.02)


def test_an_alert_that_comes_back_soon_goes_on_and_one_that_comes_back_late_is_another():
    def share(k):
        return 0.0 if 25 <= k < 25 + gap else 0.9

    for gap, count in ((2, 1), (20, 2)):
        # Two steps with signal are in the window of ten for nine steps; twenty are for longer than an alert waits.
        found = [alert for alert in alerts(run(zero_signal_share=share)) if alert.rule == "dead groups"]
        assert len(found) == count, gap


def test_what_is_missing_or_not_finite_is_not_read():
    rows = [{**row, "mismatch_kl": v} for row, v in zip(run(), [None, math.nan, math.inf, "x"] * 15, strict=True)]
    assert alerts(rows) == []
    rows = [{key: v for key, v in row.items() if key != "length"} for row in run()]
    assert alerts(rows) == []


def test_step_by_step_begins_where_the_whole_does():
    rows = run(zero_signal_share=lambda k: 0.9, entropy=lambda k: math.exp(-k / 10))
    watcher = Watcher()
    begun = {alert.rule: row["step"] for row in rows for alert in watcher.add(row)}
    assert begun == {"dead groups": 10, "entropy collapse": 27}
    assert watcher.alerts == alerts(reversed(rows))


@pytest.mark.parametrize(
    "settings",
    [{"window": 1}, {"length": 1.0}, {"entropy": 0}, {"dead_groups": 2}, {"explained_variance": 0}, {"truncation": 25}],
)
def test_limits_that_make_no_sense_are_refused(settings):
    with pytest.raises(InputError, match=rf"alerts\.{next(iter(settings))}: is"):
        AlertLimits(**settings)
