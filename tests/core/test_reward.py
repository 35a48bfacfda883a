"""The reward model's loss, with a pencil."""

import math

import pytest
import torch

from tulu_lightning.core.preference import Pair
from tulu_lightning.core.reward import bradley_terry


def test_it_is_minus_the_log_of_the_chance_that_the_chosen_side_wins():
    # A difference of log 3 are odds of 3 to 1: the chance is 3/4. Equal rewards: 1/2. The wrong way round: 1/4.
    chosen_B = torch.tensor([math.log(3), 5.0, -1.0])
    rejected_B = torch.tensor([0.0, 5.0, math.log(3) - 1])
    loss_B = bradley_terry(Pair(chosen_B, rejected_B))
    assert loss_B.tolist() == pytest.approx([-math.log(3 / 4), math.log(2), math.log(4)], rel=1e-6)


def test_its_gradient_is_the_chance_of_being_wrong_and_rewards_have_no_zero():
    chosen_B = torch.tensor([math.log(3), -200.0], requires_grad=True)
    rejected_B = torch.tensor([0.0, 200.0], requires_grad=True)
    loss_B = bradley_terry(Pair(chosen_B, rejected_B))
    loss_B.sum().backward()
    assert chosen_B.grad is not None
    assert rejected_B.grad is not None
    assert chosen_B.grad.tolist() == pytest.approx([-1 / 4, -1])
    assert rejected_B.grad.tolist() == pytest.approx([1 / 4, 1])
    assert float(loss_B[1].detach()) == pytest.approx(400), "no overflow where the model is sure and wrong"
    with torch.no_grad():
        torch.testing.assert_close(bradley_terry(Pair(chosen_B + 7, rejected_B + 7)), loss_B, rtol=1e-5, atol=1e-6)
