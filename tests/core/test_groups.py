"""Advantages within groups against plain Python, and what must hold of them whatever the scores are."""

import itertools
import statistics

import pytest
import torch

from tulu_lightning.core.advantages import moments, whiten
from tulu_lightning.core.estimators import GAE, needs_critic
from tulu_lightning.core.groups import GRPO, RLOO, DrGRPO, ReinforcePlusPlus, dead_groups, signal_share
from tulu_lightning.errors import InputError

RULES = [GRPO(), DrGRPO(), RLOO(), ReinforcePlusPlus()]
WITH_BASELINE = RULES[:3]


def advantages(rule, scores, groups):
    return rule(torch.tensor(scores, dtype=torch.float64), torch.tensor(groups)).tolist()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # mean 2.5; squares 56.25 + 3 · 6.25 = 75, by n - 1: 25, root 5
        (GRPO(0.0), [1.5, -0.5, -0.5, -0.5]),
        (GRPO(5.0), [0.75, -0.25, -0.25, -0.25]),
        (DrGRPO(), [7.5, -2.5, -2.5, -2.5]),
        (RLOO(), [10.0, -10 / 3, -10 / 3, -10 / 3]),
        (ReinforcePlusPlus(), [7.5, -2.5, -2.5, -2.5]),
    ],
    ids=str,
)
def test_one_right_answer_of_four_by_hand(rule, expected):
    assert advantages(rule, [10.0, 0.0, 0.0, 0.0], [3, 3, 3, 3]) == pytest.approx(expected, abs=1e-12)


def slow(rule, own, score):
    """One score against the list of its group's."""
    if len(own) == 1:
        return score if isinstance(rule, ReinforcePlusPlus) else 0.0
    if isinstance(rule, RLOO):
        return score - (sum(own) - score) / (len(own) - 1)
    centred = score - statistics.fmean(own)
    return centred / (statistics.stdev(own) + rule.eps) if isinstance(rule, GRPO) else centred


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_unequal_groups_in_any_order_equal_the_slow_version(rule, seed):
    g = torch.Generator().manual_seed(seed)
    ids = torch.tensor([100 + 7 * i for i in range(12) for _ in range(1 + i % 5)])
    order = torch.randperm(len(ids), generator=g)
    scores = 10 * torch.rand(len(ids), generator=g, dtype=torch.float64)
    groups = ids[order]
    expected = [
        slow(rule, scores[groups == group].tolist(), score)
        for score, group in zip(scores.tolist(), groups.tolist(), strict=True)
    ]
    assert rule(scores, groups).tolist() == pytest.approx(expected, abs=1e-9)
    again = torch.randperm(len(ids), generator=g)
    torch.testing.assert_close(rule(scores[again], groups[again]), rule(scores, groups)[again], atol=1e-9, rtol=0)
    assert rule(scores.float(), groups).dtype == torch.float32


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equal_scores_give_exactly_nothing_in_fp32(rule):
    """3 · 0.1 / 3 is not 0.1 in fp32, and 1e-8 / (0 + 1e-8) is a whole advantage."""
    scores = torch.tensor([0.1] * 3 + [0.7] * 7 + [10.0, 0.0])
    groups = torch.tensor([0] * 3 + [1] * 7 + [2, 2])
    found = rule(scores, groups)
    assert found[:10].tolist() == [0.0] * 10
    assert found[10] > 0


@pytest.mark.parametrize("rule", WITH_BASELINE, ids=str)
def test_a_group_of_one_teaches_nothing(rule):
    assert advantages(rule, [10.0, 5.0, 0.0], [4, 2, 2])[0] == 0.0


def test_reinforce_plus_plus_without_groups_whitens_the_scores():
    """Scores 10, 0, 0, 2: mean 3, squares 49 + 9 + 9 + 1 = 68, deviation √(68/3)."""
    rule = ReinforcePlusPlus()
    assert rule.whiten_batch
    found = rule(torch.tensor([10.0, 0.0, 0.0, 2.0], dtype=torch.float64), torch.arange(4))
    found = whiten(found, moments(found))
    assert found.tolist() == pytest.approx([x / (68 / 3) ** 0.5 for x in (7, -3, -3, -1)], abs=1e-7)


@pytest.mark.parametrize("rule", [*WITH_BASELINE, ReinforcePlusPlus()], ids=str)
def test_a_constant_for_all_answers_of_a_prompt_changes_nothing(rule):
    scores, groups = [10.0, 0.0, 3.0, 1.0, 1.0, 8.0], [0, 0, 0, 1, 1, 1]
    shifted = [s + (5.0 if g else -3.0) for s, g in zip(scores, groups, strict=True)]
    assert advantages(rule, shifted, groups) == pytest.approx(advantages(rule, scores, groups), abs=1e-9)


def test_only_grpo_forgets_the_scale():
    scores, groups = [10.0, 0.0, 3.0], [0, 0, 0]
    tenfold = [10 * s for s in scores]
    assert advantages(GRPO(), tenfold, groups) == pytest.approx(advantages(GRPO(), scores, groups), abs=1e-7)
    for rule in (DrGRPO(), RLOO()):
        assert advantages(rule, tenfold, groups) == pytest.approx([10 * a for a in advantages(rule, scores, groups)])


@pytest.mark.parametrize("n", [2, 3, 4])
def test_leave_one_out_is_unbiased_and_centring_is_short_by_a_share(n):
    """The mean of A ∇log π over every group that a policy over three arms can draw, against the gradient of E[r].

    ∂E[r]/∂logit_i = p_i (r_i - E[r]). Centring shrinks it to (n - 1) / n: the mean holds the response's own score.
    """
    p, r = [0.5, 0.3, 0.2], [1.0, 0.0, 4.0]
    expected = [pi * (ri - sum(a * b for a, b in zip(p, r, strict=True))) for pi, ri in zip(p, r, strict=True)]
    found = {rule: [0.0] * 3 for rule in (RLOO(), DrGRPO())}
    for arms in itertools.product(range(3), repeat=n):
        chance = torch.tensor([p[a] for a in arms], dtype=torch.float64).prod().item()
        for rule, total in found.items():
            for arm, advantage in zip(arms, advantages(rule, [r[a] for a in arms], [0] * n), strict=True):
                for i in range(3):
                    total[i] += chance * advantage * ((arm == i) - p[i]) / n
    assert found[RLOO()] == pytest.approx(expected, abs=1e-12)
    assert found[DrGRPO()] == pytest.approx([e * (n - 1) / n for e in expected], abs=1e-12)


def test_groups_without_a_signal():
    scores = torch.tensor([10.0, 0.0, 10.0, 10.0, 0.0, 0.0, 5.0])
    groups = torch.tensor([9, 4, 4, 9, 2, 2, 7])  # 4 alone has two scores
    assert dead_groups(scores, groups) == [2, 7, 9]
    assert signal_share(scores, groups) == 0.25


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_nothing_gives_nothing(rule):
    nothing, none = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert rule(nothing, none).tolist() == []
    assert signal_share(nothing, none) == 0.0
    assert dead_groups(nothing, none) == []


def test_gae_alone_needs_a_critic():
    assert needs_critic(GAE())
    assert not any(needs_critic(rule) for rule in RULES)
    assert [GAE().whiten_batch, GAE(whiten=False).whiten_batch, GRPO().whiten_batch] == [True, False, False]


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: GAE(lam=1.5), "advantage.lam"),
        (lambda: GAE(gamma=float("nan")), "advantage.gamma"),
        (lambda: GRPO(eps=-1.0), "advantage.eps"),
    ],
)
def test_settings_out_of_range_are_refused(build, key):
    with pytest.raises(InputError, match=key):
        build()
