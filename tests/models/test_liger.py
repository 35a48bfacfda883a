"""Which head loss is taken: another one must agree on uneven weights and be faster, and only CUDA is asked."""

import time

import pytest
import torch

from tulu_lightning.core.nll import WeightedNll, weighted_nll
from tulu_lightning.models.liger import choose, head_loss


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(1)
    hidden, head = (torch.randn(n, 16, generator=g).requires_grad_() for n in (37, 50))
    return hidden, head, torch.randint(0, 50, (37,), generator=g)


def slow(*args):
    time.sleep(0.05)
    return weighted_nll(*args)


def uneven_wrong(hidden, head, target, weight):
    """Right for even weights only: the mean of the weights stands for each."""
    return weighted_nll(hidden, head, target, weight.mean().expand(len(weight)).contiguous())


def wrong_gradient(hidden, head, target, weight):
    result = weighted_nll(hidden, head, target, weight)
    return WeightedNll(result.loss.detach() + 0.9 * (result.loss - result.loss.detach()), result.logp_N)


def failing(*args):
    raise RuntimeError("no kernel image")


def test_the_faster_one_is_taken_if_both_agree(inputs):
    assert choose(slow, {"fast": weighted_nll}, *inputs) is weighted_nll
    assert choose(weighted_nll, {"slow": slow}, *inputs) is weighted_nll


@pytest.mark.parametrize("theirs", [uneven_wrong, wrong_gradient, failing])
def test_one_that_is_wrong_or_fails_is_not_taken_however_fast(theirs, inputs):
    assert choose(slow, {"theirs": theirs}, *inputs) is slow
    assert inputs[0].grad is None
    assert inputs[1].grad is None


def test_of_several_the_fastest_right_one_is_taken(inputs):
    def slower(*args):
        time.sleep(0.02)
        return weighted_nll(*args)

    others = {"fails": failing, "slower": slower, "wrong": uneven_wrong, "fast": weighted_nll}
    assert choose(slow, others, *inputs) is weighted_nll
    assert choose(slow, {"fails": failing, "slower": slower}, *inputs) is slower
    assert choose(slow, {}, *inputs) is slow


def test_a_frozen_head_is_compared_by_the_hidden_states_alone(inputs):
    hidden, head, target = inputs
    assert choose(slow, {"fast": weighted_nll}, hidden, head.detach(), target) is weighted_nll
    assert choose(slow, {"wrong": wrong_gradient}, hidden, head.detach(), target) is slow


def test_off_cuda_it_is_ours(inputs):
    assert head_loss(*inputs) is weighted_nll
