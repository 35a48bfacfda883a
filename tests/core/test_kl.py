"""The KL: estimators by hand, gradients under samples of the policy, refused settings, and the adaptive coefficient."""

import math

import pytest
import torch

from tulu_lightning.core.kl import Kl, adapted, k1, k2, k3, kl_loss
from tulu_lightning.errors import InputError


def test_estimators_by_hand():
    logp, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])  # d = log 2
    assert k1(logp, reference).item() == pytest.approx(math.log(2))
    assert k2(logp, reference).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert k3(logp, reference).item() == pytest.approx(0.5 - 1 + math.log(2))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_token_far_off_stays_finite_and_is_pulled_back(estimator):
    """k3 of d = -500 is e^500; it is held at 10, and the gradient that leads back is still there."""
    logp = torch.tensor([-500.0, 500.0], requires_grad=True)
    loss = kl_loss(logp, torch.zeros(2), estimator)
    assert torch.isfinite(loss).all()
    loss.sum().backward()
    assert logp.grad.tolist() == [-500.0, 500.0]  # d itself
    if estimator == "k3":
        assert loss.tolist() == [10.0, 10.0]


def test_straight_through_has_the_value_of_k3_and_the_gradient_of_k2():
    d = torch.linspace(-2, 2, 9, dtype=torch.float64)
    logp = d.clone().requires_grad_(True)
    loss = kl_loss(logp, torch.zeros(9), "k3")
    assert loss.tolist() == k3(d, torch.zeros(9)).tolist()
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, d)


# The gradient, under samples of the policy ------------------------------------------------------------------------------

LOGITS = torch.tensor([1.0, 0.2, -0.5, 0.0, -1.5], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([-0.5, 1.0, 0.3, 0.0, -0.5], dtype=torch.float64), 0)
SAMPLES = 200_000


def exact_gradient():
    """∂ KL(π || π_ref) / ∂ logit_i = p_i (d_i - KL)."""
    logp = torch.log_softmax(LOGITS, 0)
    d, p = logp - REFERENCE, logp.exp()
    return p * (d - (p * d).sum())


def sampled_gradient(loss_of):
    """Mean gradient of a per-token loss over samples, and the standard error of each coordinate."""
    p = torch.softmax(LOGITS, 0)
    arms = torch.multinomial(p, SAMPLES, replacement=True, generator=torch.Generator().manual_seed(0))
    logits = LOGITS.clone().requires_grad_(True)
    loss_of(torch.log_softmax(logits, 0)[arms], REFERENCE[arms]).mean().backward()
    per_arm = []
    for arm in range(len(p)):
        single = LOGITS.clone().requires_grad_(True)
        loss_of(torch.log_softmax(single, 0)[arm : arm + 1], REFERENCE[arm : arm + 1]).sum().backward()
        per_arm.append(single.grad)
    return logits.grad, torch.stack(per_arm)[arms].std(0) / SAMPLES**0.5


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_gradient_of_the_loss_is_that_of_the_kl(estimator):
    mean, error = sampled_gradient(lambda logp, reference: kl_loss(logp, reference, estimator))
    assert error.max() < 0.01
    assert ((mean - exact_gradient()).abs() < 4 * error).all()


@pytest.mark.parametrize("plain", [k1, k3], ids=["k1", "k3"])
def test_a_plain_estimator_as_a_loss_has_another_gradient(plain):
    mean, error = sampled_gradient(plain)
    off = (mean - exact_gradient()).abs()
    assert (off > 10 * error).any()
    p = torch.softmax(LOGITS, 0)
    # What they are instead: nothing, and the gradient of KL(π_ref || π), which is p - p_ref.
    instead = torch.zeros(5, dtype=torch.float64) if plain is k1 else p - REFERENCE.exp()
    assert ((mean - instead).abs() < 4 * error).all()


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_on_samples_of_an_older_policy_the_ratio_puts_the_gradient_right(estimator):
    """By enumeration: arms weighted by π_old, the loss by π / π_old."""
    old = torch.softmax(LOGITS.flip(0), 0)

    def off(with_ratio):
        logits = LOGITS.clone().requires_grad_(True)
        logp = torch.log_softmax(logits, 0)
        (old * kl_loss(logp, REFERENCE, estimator, logp.exp() / old if with_ratio else None)).sum().backward()
        return float((logits.grad - exact_gradient()).abs().max())

    assert off(with_ratio=True) < 1e-12
    assert off(with_ratio=False) > 0.05


def test_k1_in_the_reward_leads_to_the_gradient_of_the_kl():
    """-k1 as an advantage without gradient: the policy gradient descends the KL."""
    mean, error = sampled_gradient(lambda logp, reference: k1(logp, reference).detach() * logp)
    assert ((mean - exact_gradient()).abs() < 4 * error).all()


# Settings -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"place": "loss"}, "kl.estimator"),  # k1 there
        ({"estimator": "k3"}, "kl.estimator"),  # in the reward
        ({"estimator": "k2"}, "kl.estimator"),
        ({"estimator": "k4"}, "kl.estimator"),
        ({"place": "both"}, "kl.place"),
        ({"coefficient": -0.1}, "kl.coefficient"),
        ({"coefficient": float("nan")}, "kl.coefficient"),
        ({"coefficient": 0.0, "target": 6.0}, "kl.coefficient"),
        ({"target": 0.0}, "kl.target"),
        ({"horizon": 500}, "kl.horizon"),  # without a target
        ({"target": 6.0, "horizon": 0}, "kl.horizon"),
    ],
    ids=str,
)
def test_pairs_that_clash_or_do_nothing_are_refused(settings, key):
    with pytest.raises(InputError, match=key):
        Kl(**settings)


def test_k1_is_no_loss():
    with pytest.raises(InputError, match=r"kl\.estimator"):
        kl_loss(torch.zeros(1), torch.zeros(1), "k1")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"coefficient": 0.0},
        {"place": "loss", "estimator": "k2"},
        {"place": "loss", "estimator": "k3", "coefficient": 0.01, "target": 3.0, "horizon": 5000},
    ],
    ids=str,
)
def test_pairs_that_make_sense_are_taken(settings):
    Kl(**settings)


# The adaptive coefficient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "factor"),
    [
        (6.0, 1.0),  # on target
        (6.6, 1 + 0.1 * 0.05),  # a tenth above, 500 of 10,000 responses
        (5.4, 1 - 0.1 * 0.05),
        (60.0, 1 + 0.2 * 0.05),  # held at a fifth
        (0.0, 1 - 0.2 * 0.05),
        (-1.0, 1 - 0.2 * 0.05),  # k1 may be negative
        (float("nan"), 1.0),
        (float("inf"), 1.0),
    ],
)
def test_one_step_of_the_controller(measured, factor):
    assert adapted(0.1, measured, 500, Kl(target=6.0)) == pytest.approx(0.1 * factor, rel=1e-12)


def test_several_steps_and_no_target():
    kl = Kl(coefficient=0.2, target=4.0, horizon=1000)
    beta = kl.coefficient
    for measured in (5.0, 5.0, 3.0):  # errors +0.2 (held), +0.2, -0.2; 250 responses are a quarter of the horizon
        beta = adapted(beta, measured, 250, kl)
    assert beta == pytest.approx(0.2 * 1.05 * 1.05 * 0.95, rel=1e-12)
    assert adapted(0.2, 100.0, 250, Kl()) == 0.2


def test_a_batch_far_larger_than_the_horizon_moves_by_a_fifth():
    assert adapted(0.1, 0.0, 100_000, Kl(target=6.0)) == pytest.approx(0.08)
