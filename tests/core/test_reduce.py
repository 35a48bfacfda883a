"""Sums over segments and over the two sides of a pair, worked out by hand."""

import torch

from tulu_lightning.core.reduce import pair_sum


def test_what_both_sides_begin_with_counts_for_both() -> None:
    """Two pairs; the first shares a scored token (1), the second nothing: 1+2=3, 1+4=5; 8, 16+32=48."""
    values_N = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    chosen_B, rejected_B = pair_sum(values_N, torch.tensor([0, 1, 2, 4, 5, 5]), 2)
    assert chosen_B.tolist() == [3.0, 8.0]
    assert rejected_B.tolist() == [5.0, 48.0]


def test_a_shared_token_gets_the_gradient_of_both_sides() -> None:
    """d(3·chosen - 2·rejected): shared 1, chosen 3, rejected -2."""
    values_N = torch.ones(3, requires_grad=True)
    chosen_B, rejected_B = pair_sum(values_N, torch.tensor([0, 1, 2]), 1)
    (3 * chosen_B - 2 * rejected_B).sum().backward()
    assert values_N.grad is not None
    assert values_N.grad.tolist() == [1.0, 3.0, -2.0]
