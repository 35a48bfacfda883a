"""A gradient that is not finite costs one update, and many in a row end the run with the network's name."""

import pytest
import torch
from torch import nn

from tulu_lightning.models.backbone import Backbone
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.sft import SFT
from tulu_lightning.stages.stage import NonFiniteError


class Optimizer:
    """What Lightning hands out: the real optimiser, wrapped."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad


@pytest.fixture
def stage(monkeypatch):
    monkeypatch.setattr(SFT, "total_steps", 100)
    return SFT(Backbone("tiny-random-llama"), AdamW(lr=0.1, max_skipped=3))


def test_it_skips_the_update_and_goes_on(stage):
    weight = nn.Parameter(torch.ones(2))
    optimizer = Optimizer(stage.optimizer.build([weight]))
    weight.grad = torch.tensor([float("nan"), 1.0])
    assert stage.update(stage.optimizer, optimizer, [weight]) != 0
    assert weight.tolist() == [1.0, 1.0]
    assert weight.grad is None
    weight.grad = torch.tensor([1.0, 1.0])
    stage.update(stage.optimizer, optimizer, [weight])
    assert weight.tolist() == pytest.approx([0.9, 0.9], abs=1e-5)  # Adam's first step is the learning rate
    assert stage.skipped == {"policy": 0}


def test_a_finite_critic_does_not_hide_a_policy_that_never_is(stage):
    weight = nn.Parameter(torch.ones(2))
    optimizer = Optimizer(stage.optimizer.build([weight]))

    def one_step():
        weight.grad = torch.tensor([1.0, 1.0])
        stage.update(stage.optimizer, optimizer, [weight], "critic")
        weight.grad = torch.tensor([float("inf"), 1.0])
        stage.update(stage.optimizer, optimizer, [weight], "policy")

    for _ in range(2):
        one_step()
    with pytest.raises(
        NonFiniteError, match=r"the policy's gradient was not finite for 3 updates in a row, up to step 0"
    ):
        one_step()
