import pytest

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
    # One item of 200: e^-1 = 37% of the resamples miss it, so the lower end is 0, which is not above 0.
    decision = PromotionRule().decide(BASE, SLIGHTLY_BETTER)
    assert not decision.promote
    assert decision.low == 0.0
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
    assert PromotionRule(max_loss=0.01).decide(BASE, BASE).promote
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


@pytest.mark.parametrize(
    "settings",
    [{"min_gain": 0.1, "max_loss": 0.1}, {"max_loss": -0.1}, {"confidence": 95}, {"min_items": 0}],
)
def test_a_rule_that_makes_no_sense_is_refused(settings):
    with pytest.raises(InputError, match="promotion"):
        PromotionRule(**settings)
