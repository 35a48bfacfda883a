"""The clipped losses token by token, by hand and against plain Python, the KL estimators, and the learning rate."""

import math

import pytest
import torch

from tulu_lightning.core.kl import k1, k2, k3
from tulu_lightning.core.policy import ClippedPolicy, ClippedValue
from tulu_lightning.core.schedules import lr_factor
from tulu_lightning.errors import InputError


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 2.0, -2.4, True),  # held at 1.2: more of a good thing is not rewarded
        (1.5, -2.0, 3.0, False),  # but more of a bad one is punished in full
        (0.5, -2.0, 1.6, True),  # held at 0.8
        (0.5, 2.0, -1.0, False),
    ],
)
def test_every_side_of_the_clipped_surrogate(ratio, advantage, loss, clipped):
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    terms = ClippedPolicy(0.2, 0.2)(logp, torch.zeros(1), torch.tensor([advantage]))
    assert terms.loss_N.item() == pytest.approx(loss, abs=1e-5)
    assert terms.clipped_N.item() is clipped
    terms.loss_N.sum().backward()
    # d loss / d logp = -ratio * advantage where it is free, 0 where it is held
    assert logp.grad.item() == pytest.approx(0 if clipped else -ratio * advantage, abs=1e-5)


def test_a_huge_log_ratio_stays_finite():
    terms = ClippedPolicy()(torch.tensor([500.0]), torch.zeros(1), torch.tensor([-1.0]))
    assert torch.isfinite(terms.loss_N).all()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (5.0, -2.0, 6.0, True),  # 10 without: held at c · 2
        (2.5, -2.0, 5.0, False),  # below c
        (5.0, 2.0, -2.4, True),  # A > 0 knows nothing of c
        (0.5, -2.0, 1.6, True),  # the lower end holds as before
    ],
)
def test_the_dual_clip_bounds_what_a_bad_token_can_cost(ratio, advantage, loss, clipped):
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    terms = ClippedPolicy(dual_clip=3.0)(logp, torch.zeros(1), torch.tensor([advantage]))
    assert terms.loss_N.item() == pytest.approx(loss, abs=1e-5)
    assert terms.clipped_N.item() is clipped
    terms.loss_N.sum().backward()
    assert logp.grad.item() == pytest.approx(0 if clipped else -ratio * advantage, abs=1e-5)


def slow_policy_loss(ratio, advantage, low, high, dual):
    held = min(max(ratio, 1 - low), 1 + high)
    gain = min(ratio * advantage, held * advantage)
    if dual is not None and advantage < 0:
        gain = max(gain, dual * advantage)
    return -gain


def slow_value_loss(value, old, target, clip):
    held = max(old - clip, min(value, old + clip))
    return 0.5 * max((value - target) ** 2, (held - target) ** 2)


@pytest.mark.parametrize(("low", "high", "dual"), [(0.2, 0.2, None), (0.2, 0.272, None), (0.1, 0.5, 3.0)])
def test_both_losses_equal_plain_python_in_fp64(low, high, dual):
    g = torch.Generator().manual_seed(0)
    logp, old, advantages = torch.randn(3, 500, generator=g, dtype=torch.float64)
    rows = zip((logp - old).exp().tolist(), advantages.tolist(), strict=True)
    expected = [slow_policy_loss(ratio, a, low, high, dual) for ratio, a in rows]
    terms = ClippedPolicy(low, high, dual)(logp, old, advantages)
    assert terms.loss_N.tolist() == pytest.approx(expected, abs=1e-9)
    expected = [slow_value_loss(*row, low) for row in zip(*(x.tolist() for x in (logp, old, advantages)), strict=True)]
    assert ClippedValue(low)(logp, old, advantages).loss_N.tolist() == pytest.approx(expected, abs=1e-9)


def test_clipped_tokens_are_those_without_a_gradient():
    g = torch.Generator().manual_seed(1)
    logp, old, advantages = torch.randn(3, 500, generator=g, dtype=torch.float64)
    logp.requires_grad_(True)
    terms = ClippedPolicy(0.2, 0.3, dual_clip=2.0)(logp, old, advantages)
    terms.loss_N.sum().backward()
    expected = torch.where(terms.clipped_N, 0.0, -terms.ratio_N * advantages)
    torch.testing.assert_close(logp.grad, expected, atol=1e-12, rtol=0)
    assert 0.1 < terms.clipped_N.double().mean() < 0.9


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"dual_clip": 1.0}, "policy_loss.dual_clip"),
        ({"dual_clip": float("inf")}, "policy_loss.dual_clip"),
        ({"clip_low": 1.5}, "policy_loss.clip_low"),
        ({"clip_high": 0.0}, "policy_loss.clip_high"),
    ],
    ids=str,
)
def test_clips_out_of_range_are_refused(settings, key):
    with pytest.raises(InputError, match=key):
        ClippedPolicy(**settings)


def test_value_loss_takes_the_larger_error():
    # old 0, clip 0.2, return 1: value 0.5 is held at 0.2, whose error 0.8 is the larger.
    terms = ClippedValue(0.2)(torch.tensor([0.5, 0.1]), torch.zeros(2), torch.tensor([1.0, 1.0]))
    assert terms.loss_N.tolist() == pytest.approx([0.5 * 0.64, 0.5 * 0.81])
    assert terms.clipped_N.tolist() == [True, False]


def test_kl_estimators_by_hand_and_on_average():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    true = float((p * (p / q).log()).sum())
    logp, logq = p.log(), q.log()
    assert float((p * k1(logp, logq)).sum()) == pytest.approx(true, abs=1e-6)
    assert float((p * k3(logp, logq)).sum()) == pytest.approx(true, abs=1e-6)
    assert float(k2(torch.tensor([2.0]), torch.tensor([0.0]))) == 2.0
    assert (k3(logp, logq) >= 0).all()


def test_schedules():
    assert [lr_factor(s, 4) for s in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    # ceil(0.3 * 5) = 2 warm-up steps at 1/3 and 2/3, then three down from 1.
    assert [lr_factor(s, 5, "linear", 0.3) for s in range(5)] == pytest.approx([1 / 3, 2 / 3, 1, 2 / 3, 1 / 3])
    assert lr_factor(3, 6, "cosine") == pytest.approx(0.5)
    assert {lr_factor(s, 6, "constant") for s in range(6)} == {1.0}
