"""DPO by pencil and against an independent slow version."""

import math

import pytest
import torch

from tulu_lightning.core.preference import DPO, Pair


def pair(chosen, rejected):
    return Pair(torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64))


def test_one_pair_worked_out():
    # Chosen: 4 tokens, log-ratio -2 - (-4) = 2, per token 0.5. Rejected: 2 tokens, -3 - (-2) = -1, per token -0.5.
    policy, reference, lengths = pair([-2.0], [-3.0]), pair([-4.0], [-2.0]), pair([4.0], [2.0])
    terms = DPO(beta=5.0)(policy, reference, lengths)
    # Margin 5 * (0.5 + 0.5) = 5; loss = ln(1 + e^-5).
    assert terms.loss_B.item() == pytest.approx(math.log1p(math.exp(-5)))
    assert (terms.rewards.chosen_B.item(), terms.rewards.rejected_B.item()) == (2.5, -2.5)
    # Without normalisation the margin is 0.1 * (2 + 1) = 0.3.
    plain = DPO(beta=0.1, length_normalised=False)(policy, reference, lengths)
    assert plain.loss_B.item() == pytest.approx(math.log1p(math.exp(-0.3)))


def test_equal_policies_give_log_two_and_rewards_carry_no_gradient():
    policy = Pair(*(torch.tensor([-5.0, -7.0], requires_grad=True) for _ in range(2)))
    terms = DPO()(policy, Pair(*(x.detach() for x in policy)), pair([3, 4], [5, 6]))
    assert terms.loss_B.tolist() == pytest.approx([math.log(2)] * 2)
    assert not terms.rewards.chosen_B.requires_grad


def test_gradient_equals_the_scalar_derivation():
    # d loss / d logp_chosen = -σ(-margin) β / |c|, and + β / |r| for rejected.
    policy = Pair(*(torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-6.0, -5.0)))
    DPO(beta=2.0)(policy, pair([-5.0], [-6.0]), pair([3.0], [4.0])).loss_B.sum().backward()
    margin = 2 * (-1 / 3) - 2 * (1 / 4)
    sigma = 1 / (1 + math.exp(margin))
    assert policy.chosen_B.grad.item() == pytest.approx(-sigma * 2 / 3)
    assert policy.rejected_B.grad.item() == pytest.approx(sigma * 2 / 4)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_beta_must_be_above_zero(beta):
    with pytest.raises(ValueError, match="beta"):
        DPO(beta=beta)
