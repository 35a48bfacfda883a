"""The preference losses by pencil, at their limits and against an independent slow version, pair by pair in fp64."""

import math
import random

import pytest
import torch

from tulu_lightning.core.preference import DPO, IPO, WPO, ConservativeDPO, Pair, PreferenceLoss, SimPO
from tulu_lightning.errors import InputError

LOSSES = (DPO, ConservativeDPO, IPO, SimPO, WPO)


def pair(chosen, rejected):
    return Pair(torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64))


def leaves(values: Pair) -> Pair:
    return Pair(*(side_B.clone().requires_grad_() for side_B in values))


def random_pairs(count=64, seed=0):
    """Answers of 1 to 400 tokens at 0.2 to 4 nats a token; the reference is up to 1 nat a token away."""
    draw = random.Random(seed)
    tokens = [[draw.randint(1, 400) for _ in range(count)] for _ in range(2)]
    policy = [[-n * draw.uniform(0.2, 4) for n in side] for side in tokens]
    moved = [
        [p + n * draw.uniform(-1, 1) for p, n in zip(*both, strict=True)] for both in zip(policy, tokens, strict=True)
    ]
    return pair(*policy), pair(*moved), pair(*tokens)


# The slow versions: one pair at a time, Python floats, straight from the papers ------------------------------------------


def minus_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x)) - x


def sigmoid(x: float) -> float:
    return math.exp(-minus_log_sigmoid(x))


def slow_dpo(c, r, ref_c, ref_r, n_c, n_r, beta, length_normalised):
    """Loss, its derivatives by log π(c) and log π(r), and both rewards."""
    per_c, per_r = (beta / n_c, beta / n_r) if length_normalised else (beta, beta)
    reward_c, reward_r = per_c * (c - ref_c), per_r * (r - ref_r)
    pull = sigmoid(reward_r - reward_c)
    return minus_log_sigmoid(reward_c - reward_r), -pull * per_c, pull * per_r, reward_c, reward_r


def slow_conservative(c, r, ref_c, ref_r, n_c, n_r, beta, label_smoothing, length_normalised):
    per_c, per_r = (beta / n_c, beta / n_r) if length_normalised else (beta, beta)
    reward_c, reward_r = per_c * (c - ref_c), per_r * (r - ref_r)
    margin = reward_c - reward_r
    loss = (1 - label_smoothing) * minus_log_sigmoid(margin) + label_smoothing * minus_log_sigmoid(-margin)
    slope = label_smoothing * sigmoid(margin) - (1 - label_smoothing) * sigmoid(-margin)
    return loss, slope * per_c, -slope * per_r, reward_c, reward_r


def slow_ipo(c, r, ref_c, ref_r, n_c, n_r, beta, length_normalised):
    per_c, per_r = (1 / n_c, 1 / n_r) if length_normalised else (1, 1)
    ratio_c, ratio_r = per_c * (c - ref_c), per_r * (r - ref_r)
    off = ratio_c - ratio_r - 0.5 / beta
    return off**2, 2 * off * per_c, -2 * off * per_r, beta * ratio_c, beta * ratio_r


def slow_simpo(c, r, ref_c, ref_r, n_c, n_r, beta, gamma, length_normalised):
    per_c, per_r = (beta / n_c, beta / n_r) if length_normalised else (beta, beta)
    pull = sigmoid(-(per_c * c - per_r * r - gamma))
    return minus_log_sigmoid(per_c * c - per_r * r - gamma), -pull * per_c, pull * per_r, per_c * c, per_r * r


def slow_wpo(c, r, ref_c, ref_r, n_c, n_r, beta, length_normalised):
    weight = min(1.0, math.exp(c / n_c) * math.exp(r / n_r))
    loss, by_c, by_r, *rewards = slow_dpo(c, r, ref_c, ref_r, n_c, n_r, beta, length_normalised)
    return weight * loss, weight * by_c, weight * by_r, *rewards


SLOW = {DPO: slow_dpo, ConservativeDPO: slow_conservative, IPO: slow_ipo, SimPO: slow_simpo, WPO: slow_wpo}
SETTINGS = [
    (DPO, {"beta": 5.0, "length_normalised": True}),
    (DPO, {"beta": 0.1, "length_normalised": False}),
    (ConservativeDPO, {"beta": 5.0, "label_smoothing": 0.1, "length_normalised": True}),
    (ConservativeDPO, {"beta": 0.1, "label_smoothing": 0.3, "length_normalised": False}),
    (IPO, {"beta": 0.1, "length_normalised": False}),
    (IPO, {"beta": 0.5, "length_normalised": True}),
    (SimPO, {"beta": 2.0, "gamma": 1.0, "length_normalised": True}),
    (SimPO, {"beta": 0.1, "gamma": 0.0, "length_normalised": False}),
    (WPO, {"beta": 0.01, "length_normalised": False}),
    (WPO, {"beta": 5.0, "length_normalised": True}),
]


@pytest.mark.parametrize(("loss", "settings"), SETTINGS, ids=lambda x: getattr(x, "__name__", None))
def test_values_rewards_and_gradients_equal_the_slow_version(loss, settings):
    policy, reference, lengths = random_pairs()
    policy = leaves(policy)
    terms = loss(**settings)(policy, reference, lengths)
    terms.loss_B.sum().backward()
    found = [terms.loss_B.tolist(), policy.chosen_B.grad.tolist(), policy.rejected_B.grad.tolist()]
    found += [side_B.tolist() for side_B in terms.rewards]
    sides = [side_B.tolist() for values in (policy, reference, lengths) for side_B in values]
    expected = [SLOW[loss](*numbers, **settings) for numbers in zip(*sides, strict=True)]
    for ours, slow in zip(found, zip(*expected, strict=True), strict=True):
        assert ours == pytest.approx(slow, rel=1e-9, abs=1e-12)


# By pencil -----------------------------------------------------------------------------------------------------------

# Chosen: 4 tokens, log-ratio -2 - (-4) = 2, per token 0.5. Rejected: 2 tokens, -3 - (-2) = -1, per token -0.5.
POLICY, REFERENCE, LENGTHS = pair([-2.0], [-3.0]), pair([-4.0], [-2.0]), pair([4.0], [2.0])


@pytest.mark.parametrize(
    ("loss", "value", "rewards"),
    [
        (DPO(), math.log1p(math.exp(-5)), (2.5, -2.5)),  # margin 5 * (0.5 + 0.5) = 5
        (DPO(0.1, length_normalised=False), math.log1p(math.exp(-0.3)), (0.2, -0.1)),  # 0.1 * (2 + 1)
        # 0.9 ln(1 + e^-5) + 0.1 ln(1 + e^5), and ln(1 + e^5) = 5 + ln(1 + e^-5)
        (ConservativeDPO(), math.log1p(math.exp(-5)) + 0.5, (2.5, -2.5)),
        (IPO(), 4.0, (0.2, -0.1)),  # (2 + 1 - 1 / 0.2)²
        (IPO(0.5, length_normalised=True), 0.0, (0.25, -0.25)),  # (0.5 + 0.5 - 1)²: on target
        (SimPO(), math.log1p(math.exp(-1)), (-1.0, -3.0)),  # 2 * (-2 / 4 + 3 / 2) = 2, less γ = 1
        # weight e^-0.5 e^-1.5 = e^-2, margin 0.01 * 3
        (WPO(), math.exp(-2) * math.log1p(math.exp(-0.03)), (0.02, -0.01)),
    ],
)
def test_one_pair_worked_out(loss, value, rewards):
    terms = loss(POLICY, REFERENCE, LENGTHS)
    assert terms.loss_B.item() == pytest.approx(value, abs=1e-12)
    assert [side_B.item() for side_B in terms.rewards] == pytest.approx(rewards)


@pytest.mark.parametrize("loss", [DPO(), ConservativeDPO(label_smoothing=0.2)])
def test_a_policy_that_is_the_reference_has_loss_log_two(loss):
    policy = pair([-5.0, -7.0], [-7.0, -5.0])
    assert loss(policy, policy, pair([3, 4], [5, 6])).loss_B.tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("loss", LOSSES)
def test_rewards_carry_no_gradient_and_losses_do(loss):
    policy, reference, lengths = random_pairs(3)
    terms = loss()(leaves(policy), reference, lengths)
    assert not any(side_B.requires_grad for side_B in terms.rewards)
    assert terms.loss_B.requires_grad
    assert terms.loss_B.shape == (3,)


# Limits --------------------------------------------------------------------------------------------------------------


def test_without_smoothing_conservative_dpo_is_dpo():
    pairs = random_pairs()
    smooth, plain = ConservativeDPO(2.0, label_smoothing=0.0)(*pairs), DPO(2.0)(*pairs)
    assert torch.equal(smooth.loss_B, plain.loss_B)
    assert torch.equal(torch.stack(smooth.rewards), torch.stack(plain.rewards))
    assert (ConservativeDPO().beta, ConservativeDPO().length_normalised) == (DPO().beta, DPO().length_normalised)


def test_conservative_dpo_is_smallest_where_the_label_is_as_sure_as_it_says():
    # σ(m) = 1 - ε: for ε = 0.2 at m = log 4, reached with one token, no reference to move and β = 1.
    policy = leaves(pair([math.log(4)] * 3, [0.0] * 3))
    shifted = Pair(policy.chosen_B + torch.tensor([-0.5, 0.0, 0.5]), policy.rejected_B)
    nothing, one = pair([0.0] * 3, [0.0] * 3), pair([1.0] * 3, [1.0] * 3)
    ConservativeDPO(1.0, label_smoothing=0.2)(shifted, nothing, one).loss_B.sum().backward()
    assert policy.chosen_B.grad[1].item() == pytest.approx(0, abs=1e-12)
    assert policy.chosen_B.grad[0] < 0 < policy.chosen_B.grad[2]


def test_with_answers_of_one_token_normalisation_changes_nothing():
    policy, reference, _ = random_pairs()
    one = pair([1.0] * 64, [1.0] * 64)
    for loss in LOSSES:
        on, off = (loss(length_normalised=flag)(policy, reference, one) for flag in (True, False))
        assert torch.equal(on.loss_B, off.loss_B)


def test_ipo_does_not_move_a_pair_that_is_on_target():
    # β = 0.25: the margin aimed at is 2 nats.
    policy = leaves(pair([-3.0], [-6.0]))
    IPO(0.25)(policy, pair([-4.0], [-5.0]), pair([5.0], [9.0])).loss_B.sum().backward()
    assert policy.chosen_B.grad.item() == 0


def test_simpos_margin_is_in_units_of_the_reward():
    # Rewards -1 and -3 are 2 apart: with γ = 2 the pair is on the fence.
    assert SimPO(2.0, gamma=2.0)(POLICY, None, LENGTHS).loss_B.item() == pytest.approx(math.log(2))


def test_simpo_does_not_read_a_reference():
    policy, reference, lengths = random_pairs()
    assert not SimPO.needs_reference
    assert torch.equal(SimPO()(policy, reference, lengths).loss_B, SimPO()(policy, None, lengths).loss_B)


def test_wpos_weight_is_at_most_one_and_grows_with_the_answers_probability():
    policy, reference, lengths = random_pairs()
    weighted, plain = (
        WPO(0.1)(policy, reference, lengths),
        DPO(0.1, length_normalised=False)(policy, reference, lengths),
    )
    assert (weighted.loss_B <= plain.loss_B).all()
    sure = pair([0.0], [0.0])  # probability 1 on both sides
    assert torch.equal(WPO(0.1)(sure, REFERENCE, LENGTHS).loss_B, DPO(0.1, False)(sure, REFERENCE, LENGTHS).loss_B)
    rounded = pair([1e-3], [1e-3])  # what a sum of rounded log-probs may come to
    assert torch.equal(
        WPO(0.1)(rounded, REFERENCE, LENGTHS).loss_B, DPO(0.1, False)(rounded, REFERENCE, LENGTHS).loss_B
    )


def test_wpos_gradient_is_dpos_times_the_weight_alone():
    policy, reference, lengths = random_pairs()
    ours, plain = leaves(policy), leaves(policy)
    WPO(0.1)(ours, reference, lengths).loss_B.sum().backward()
    DPO(0.1, length_normalised=False)(plain, reference, lengths).loss_B.sum().backward()
    weight_B = torch.exp(policy.chosen_B / lengths.chosen_B) * torch.exp(policy.rejected_B / lengths.rejected_B)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, weight_B * theirs.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_margin_far_out_gives_finite_numbers(loss):
    policy = leaves(Pair(torch.tensor([-1e4, -1.0]), torch.tensor([-1.0, -1e4])))
    terms = loss()(policy, Pair(torch.full((2,), -50.0), torch.full((2,), -50.0)), Pair(torch.ones(2), torch.ones(2)))
    terms.loss_B.sum().backward()
    assert all(torch.isfinite(x).all() for x in (terms.loss_B, policy.chosen_B.grad, policy.rejected_B.grad))


@pytest.mark.parametrize("loss", [DPO(), DPO(0.1, length_normalised=False), SimPO()])
def test_a_better_margin_never_raises_a_logistic_loss(loss):
    policy, reference, lengths = random_pairs()
    better = Pair(policy.chosen_B + 0.01, policy.rejected_B)
    assert (loss(better, reference, lengths).loss_B <= loss(policy, reference, lengths).loss_B).all()


# Bad settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("loss", LOSSES)
def test_beta_must_be_above_zero_and_finite(loss, beta):
    with pytest.raises(InputError, match=rf"^loss\.beta: is {beta}\. It must be above 0\.$"):
        loss(beta=beta)


@pytest.mark.parametrize("smoothing", [-0.01, 0.5, 1.0, math.nan, math.inf])
def test_label_smoothing_is_below_one_half(smoothing):
    with pytest.raises(InputError, match=r"^loss\.label_smoothing: is .* below 0\.5\.$"):
        ConservativeDPO(label_smoothing=smoothing)


@pytest.mark.parametrize("gamma", [-0.1, math.nan, math.inf])
def test_gamma_is_not_negative(gamma):
    with pytest.raises(InputError, match=r"^loss\.gamma: is .*0 or above"):
        SimPO(gamma=gamma)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.needs_reference])
def test_a_loss_that_needs_a_reference_says_so(loss):
    with pytest.raises(InputError, match=rf"^reference: is None\. {loss.__name__} compares with it: give "):
        loss()(POLICY, None, LENGTHS)


def test_every_loss_is_a_preference_loss_with_plain_fields():
    """The base class is what a config's `class_path` is held against; frozen, so a run's settings cannot drift."""
    for loss in LOSSES:
        assert issubclass(loss, PreferenceLoss)
        assert loss() == loss()
        with pytest.raises(AttributeError):
            loss().beta = 1.0
