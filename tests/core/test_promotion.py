import numpy as np
import pytest

from tulu_lightning.core.gain import Look, Paired
from tulu_lightning.core.promotion import PromotionRule
from tulu_lightning.errors import InputError

# 200 items; `worse` loses the last 4 of the 120 that `base` gets right, `better` gains 40.
BASE = [1.0] * 120 + [0.0] * 80
BETTER = [1.0] * 160 + [0.0] * 40
SLIGHTLY_BETTER = [1.0] * 121 + [0.0] * 79
SLIGHTLY_WORSE = [1.0] * 116 + [0.0] * 84


def test_a_clear_gain_is_promoted_with_its_numbers():
    decision = PromotionRule().decide(BASE, BETTER)
    assert decision.promote
    assert decision.difference == pytest.approx(0.2)
    assert 0 < decision.low < 0.2 < decision.high
    assert "rose by 0.2000 on 200 paired items" in decision.reason
    assert "above min_gain = 0.0" in decision.reason


def test_a_gain_within_chance_is_not_promoted():
    # One item of 200 gained, and one of each sort besides: X - Y with Poisson means 2 and 1. The chance of -3 and less is
    # 1.4%, of -2 and less 4.6%, so 2.5% lies at -2 items: -0.01.
    decision = PromotionRule().decide(BASE, SLIGHTLY_BETTER)
    assert not decision.promote
    assert decision.low == pytest.approx(-0.01)
    assert "not above min_gain" in decision.reason


def test_min_gain_is_asked_of_the_lower_end_not_of_the_mean():
    assert PromotionRule(min_gain=0.1).decide(BASE, BETTER).promote
    assert not PromotionRule(min_gain=0.19).decide(BASE, BETTER).promote


def test_the_guard_rule_bounds_a_loss():
    # 4 of 200 lost: difference -0.02, standard error sqrt(0.02 · 0.98 / 200) = 0.0099, lower end about -0.04.
    assert PromotionRule(max_loss=0.06).decide(BASE, SLIGHTLY_WORSE).promote
    decision = PromotionRule(max_loss=0.03).decide(BASE, SLIGHTLY_WORSE)
    assert not decision.promote
    assert "fell by 0.0200" in decision.reason
    assert "not above -max_loss = -0.03" in decision.reason


def test_unchanged_scores_pass_the_guard_and_fail_the_gain_rule():
    # That none of 200 items changed does not prove a loss below 1 in 100: the lower end is -3 items of 200.
    assert PromotionRule(max_loss=0.02).decide(BASE, BASE).promote
    assert not PromotionRule(max_loss=0.01).decide(BASE, BASE).promote
    assert not PromotionRule().decide(BASE, BASE).promote


def test_too_few_items_promote_nothing():
    decision = PromotionRule(min_items=201).decide(BASE, BETTER)
    assert not decision.promote
    assert decision.reason == "only 200 items were scored; the rule asks for 201"
    assert not PromotionRule().decide([], [1.0] * 99).promote


def test_the_first_stage_has_nothing_to_beat():
    decision = PromotionRule(min_gain=0.5).decide([], BASE)
    assert decision.promote
    assert decision.difference is None
    assert "no earlier checkpoint" in decision.reason
    assert "0.6000 on 200 items" in decision.reason


def test_unpaired_scores_are_refused():
    with pytest.raises(InputError, match="199 scores before and 200 after"):
        PromotionRule().decide(BASE[1:], BETTER)


# Several tasks ----------------------------------------------------------------------------------------------------

UP, SAME, DOWN = Paired(BASE, BETTER), Paired(BASE, BASE), Paired(BETTER, BASE)


def judge(scores, **settings):
    return PromotionRule(**settings).judge(scores)


def test_every_task_that_has_to_gain_has_to():
    assert judge({"a": UP, "b": UP}, gains={"a": 0.0, "b": 0.0}).promote
    decision = judge({"a": UP, "b": SAME}, gains={"a": 0.0, "b": 0.0})
    assert not decision.promote
    assert [(v.task, v.role, v.passed) for v in decision.verdicts] == [("a", "gain", True), ("b", "gain", False)]
    assert "a: the score rose by 0.2000" in decision.reason
    assert "b: the score moved by 0.0000" in decision.reason
    assert decision.difference == pytest.approx(0.2), "of the first task"


def test_any_of_several_gains_is_asked_for_more_surely():
    # 19 gained and 6 lost of 200: X - Y with Poisson means 20 and 7 is 13 ± 5.2, 2.5 of them above 0; 95% asks for 1.96,
    # and one of ten tasks for 2.81, as 99.5% does.
    some = Paired([0.0] * 19 + [1.0] * 181, [1.0] * 19 + [0.0] * 6 + [1.0] * 175)
    assert judge({"a": some}, gains={"a": 0.0}).promote
    scores = {"a": some, **{str(i): SAME for i in range(9)}}
    margins = dict.fromkeys(scores, 0.0)
    decision = judge(scores, gains=margins, gains_needed="any")
    assert not decision.promote
    assert all(v.confidence == pytest.approx(0.995) for v in decision.verdicts)
    assert "its 99.5% interval" in decision.reason
    assert judge({**scores, "3": UP}, gains=margins, gains_needed="any").promote


def test_a_guard_that_falls_outweighs_a_gain():
    scores = {"a": UP, "b": DOWN}
    rule = {"gains": {"a": 0.0}, "guards": {"b": 0.05}}
    decision = judge(scores, **rule)
    assert not decision.promote
    assert "b: the score fell by 0.2000" in decision.reason
    assert judge({"a": UP, "b": SAME}, **rule).promote
    assert judge(scores, gains={"a": 0.0}, guards={"b": 0.3}).promote


def test_guards_alone_let_a_checkpoint_through_that_lost_nothing():
    assert judge({"a": SAME, "b": UP}, guards={"a": 0.02}).promote
    assert not judge({"a": DOWN, "b": UP}, guards={"a": 0.02}).promote


def test_a_task_without_a_say_has_none():
    assert judge({"a": UP, "b": DOWN}, gains={"a": 0.0}).promote


def test_each_task_needs_its_items():
    few = Paired([0.0] * 99, [1.0] * 99)
    decision = judge({"a": UP, "b": few}, gains={"a": 0.0}, guards={"b": 0.5})
    assert not decision.promote
    assert decision.reason.endswith("b: only 99 items were scored; the rule asks for 100")


def test_a_look_is_asked_for_its_share():
    decision = PromotionRule().judge({"held-out": UP}, Look(2, 10))
    assert decision.promote
    assert (decision.look, decision.looks, decision.level) == (2, 10, pytest.approx(0.005))
    assert decision.reason.startswith("look 2 of 10: the score rose by 0.2000")
    assert decision.verdicts[0].confidence == pytest.approx(0.995)


def test_a_look_with_too_small_a_share_to_be_told_promotes_nothing():
    decision = PromotionRule(spending="late").judge({"held-out": UP}, Look(1, 4))
    assert not decision.promote
    assert "this look may use 9e-05 of the level" in decision.reason
    assert PromotionRule(spending="late").judge({"held-out": UP}, Look(4, 4)).promote
    assert not PromotionRule().judge({"held-out": UP}, Look(5, 4)).promote, "one more than was planned"


@pytest.mark.parametrize("gains_needed", ["all", "any"])
def test_several_tasks_without_a_gain_promote_no_oftener_than_the_level_says(gains_needed):
    # For `any`, three tasks of which none gained; for `all` its worst case, two that gained surely and one that did not.
    # At most 2.5% of 80 runs is 2, and more than 7 have a chance of 0.1%.
    rng = np.random.default_rng(3)
    rule = PromotionRule(gains={"a": 0.0, "b": 0.0, "c": 0.0}, gains_needed=gains_needed)

    def chance():
        hard = rng.beta(1, 1, 200)
        return Paired(*((rng.random(200) < hard).astype(float).tolist() for _ in range(2)))

    sure = UP if gains_needed == "all" else None
    count = sum(rule.judge({"a": sure or chance(), "b": sure or chance(), "c": chance()}).promote for _ in range(80))
    assert count <= 7


# Rules that make no sense -----------------------------------------------------------------------------------------


def test_a_task_that_is_not_evaluated_is_refused_and_the_nearest_offered():
    with pytest.raises(
        InputError, match=r"gains: the rule names 'gsm8', which Evaluate does not score\. Did you mean 'gsm8k'"
    ):
        PromotionRule(gains={"gsm8": 0.0}).check(["gsm8k", "ifeval"])
    with pytest.raises(InputError, match=r"guards: the rule names 'mmlu'.*Known: gsm8k, ifeval"):
        PromotionRule(gains={"gsm8k": 0.0}, guards={"mmlu": 0.1}).check(["gsm8k", "ifeval"])
    with pytest.raises(InputError, match=r"names no task, and 2 are evaluated \(gsm8k, ifeval\)"):
        PromotionRule().check(["gsm8k", "ifeval"])
    PromotionRule().check(["gsm8k"])
    PromotionRule().check(["held-out", "gsm8k"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"min_gain": 0.1, "max_loss": 0.1}, "only one of them can decide"),
        ({"max_loss": -0.1}, "max_loss: is -0.1"),
        ({"max_loss": 2.0}, "0.05 is 5 points"),
        ({"min_gain": 1.0}, "min_gain: is 1.0"),
        ({"confidence": 95}, "confidence: is 95"),
        ({"confidence": 1.0}, "confidence: is 1.0"),
        ({"confidence": 0.0}, "confidence: is 0.0"),
        ({"confidence": float("nan")}, "confidence: is nan"),
        ({"min_items": 0}, "min_items: is 0"),
        ({"looks": 0}, "looks: is 0"),
        ({"gains": {"a": 0.0}, "guards": {"a": 0.1}}, r"guards\.a: is a task that has to gain as well"),
        ({"gains": {"a": -0.1}}, "How far a task may fall is said under guards"),
        ({"guards": {"a": 5}}, r"guards\.a: is 5\. Scores lie in"),
        ({"gains": {"a": 0.0}, "min_gain": 0.1}, "min_gain: is given beside gains or guards"),
        ({"guards": {"a": 0.1}, "max_loss": 0.1}, "max_loss: is given beside gains or guards"),
        ({"gains": {"a": 0.0}, "gains_needed": "any"}, "fewer than two tasks"),
        ({"gains": {"a": 0.0}, "gains_needed": "al"}, "Did you mean 'all'"),
        ({"spending": "eve"}, "Did you mean 'even'"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(settings, said):
    with pytest.raises(InputError, match=said):
        PromotionRule(**settings)
