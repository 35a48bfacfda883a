"""Rewards, GAE and whitening against slow scalar versions."""

import pytest
import torch

from tulu_lightning.core.advantages import Moments, explained_variance, gae, moments, token_rewards, whiten


def slow_gae(rewards, values, gamma, lam):
    """Equation 16 of Schulman et al. as it stands: a sum of discounted deltas for each token."""
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, [*values[1:], 0.0], strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def test_one_response_by_hand():
    advantages, returns = gae(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), [2], lam=1.0)
    assert advantages.tolist() == [0.5, 0.5]
    assert returns.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.9, 0.5), (1.0, 0.0)])
def test_ragged_gae_equals_the_slow_version_of_each_response_alone(gamma, lam):
    lengths = [3, 1, 7, 2]
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(13, generator=g), torch.randn(13, generator=g)
    advantages, returns = gae(rewards, values, lengths, gamma, lam)
    slow, at = [], 0
    for n in lengths:
        slow += slow_gae(rewards[at : at + n].tolist(), values[at : at + n].tolist(), gamma, lam)
        at += n
    torch.testing.assert_close(advantages, torch.tensor(slow), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returns, advantages + values)


def test_order_and_neighbours_of_a_response_change_nothing():
    g = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(9, generator=g), torch.randn(9, generator=g)
    both, _ = gae(rewards, values, [4, 5])
    swapped, _ = gae(torch.cat([rewards[4:], rewards[:4]]), torch.cat([values[4:], values[:4]]), [5, 4])
    torch.testing.assert_close(both, torch.cat([swapped[5:], swapped[:5]]))


def test_the_score_lands_on_the_last_token_and_kl_on_every_one():
    old, reference = torch.tensor([-1.0, -1.0, -2.0]), torch.tensor([-1.5, -1.0, -1.0])
    rewards = token_rewards(torch.tensor([10.0, 0.0]), old, reference, [2, 1], kl_coefficient=0.1)
    assert rewards.tolist() == pytest.approx([-0.05, 10.0, 0.1])


def test_moments_are_those_of_all_ranks_together():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3 + 1000
    whole = moments(x)
    assert whole.mean == pytest.approx(float(x.double().mean()))
    assert whole.std == pytest.approx(float(x.double().std()))
    # Two ranks by hand: each holds a part, reduce_sum adds the other's sums.
    parts = x[:300], x[300:]

    def run(rank):
        calls = iter(
            [
                lambda s: s + torch.tensor([float(len(o)), float(o.double().sum())]),
                lambda s: s + (o.double() - whole.mean).square().sum(),
            ]
        )
        o = parts[1 - rank]
        return moments(parts[rank], lambda s: next(calls)(s))

    for rank in (0, 1):
        assert run(rank) == pytest.approx(whole)


def test_whitening_gives_mean_zero_and_deviation_one_and_guards_the_degenerate():
    x = torch.tensor([1.0, 2.0, 6.0])
    white = whiten(x, moments(x))
    assert white.mean().item() == pytest.approx(0, abs=1e-6)
    assert white.std().item() == pytest.approx(1, abs=1e-5)
    same = torch.full((4,), 3.0)
    assert whiten(same, moments(same)).tolist() == same.tolist()
    assert whiten(x[:1], Moments(1.0, 0.0, 1)).tolist() == [1.0]


def test_explained_variance_of_a_perfect_a_mean_and_a_bad_critic():
    returns = torch.tensor([0.0, 10.0, 0.0, 10.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full((4,), 5.0), returns) == 0
    assert explained_variance(10 - returns, returns) == pytest.approx(-3)  # residual doubles: variance times 4
    assert explained_variance(returns, torch.ones(4)) == 0
