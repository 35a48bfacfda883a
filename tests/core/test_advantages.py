"""Rewards, GAE and whitening against slow scalar versions."""

import json
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tulu_lightning.core.advantages import (
    Moments,
    explained_variance,
    gae,
    moments,
    response_rewards,
    token_rewards,
    whiten,
)


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


def ragged(seed, responses=40, longest=9):
    """Random lengths, and as many random fp64 rewards, values and chosen tokens; a few responses have none chosen."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (responses,), generator=g).tolist()
    rewards, values = torch.randn(2, sum(lengths), generator=g, dtype=torch.float64)
    return lengths, rewards, values, torch.rand(sum(lengths), generator=g) < 0.6


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5)])
def test_gae_equals_the_slow_version_in_fp64(gamma, lam):
    lengths, rewards, values, _ = ragged(seed=0)
    parts = zip(rewards.split(lengths), values.split(lengths), strict=True)
    slow = [a for r, v in parts for a in slow_gae(r.tolist(), v.tolist(), gamma, lam)]
    advantages, returns = gae(rewards, values, lengths, gamma, lam)
    torch.testing.assert_close(advantages, torch.tensor(slow, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(returns, advantages + values, atol=1e-12, rtol=0)


def slow_masked_gae(rewards, values, mask, gamma, lam):
    """Backwards over all tokens; at one that was not chosen both the value and the advantage stay what they were."""
    result, next_value, carry = [0.0] * len(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        if mask[t]:
            carry = rewards[t] + gamma * next_value - values[t] + gamma * lam * carry
            next_value = values[t]
            result[t] = carry
    return result


def test_gae_carries_across_tokens_that_the_policy_did_not_choose():
    lengths, rewards, values, mask = ragged(seed=1)
    mask[: lengths[0]] = False  # a whole response
    slow = []
    for parts in zip(*(x.split(lengths) for x in (rewards, values, mask)), strict=True):
        slow += slow_masked_gae(*(x.tolist() for x in parts), 0.9, 0.8)
    advantages, returns = gae(rewards, values, lengths, 0.9, 0.8, mask)
    torch.testing.assert_close(advantages, torch.tensor(slow, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(returns, torch.where(mask, advantages + values, 0.0), atol=1e-12, rtol=0)


def test_a_masked_token_by_hand():
    """γ = λ = 1, values 1 and 2 around one that counts for nothing: A = 5 - 2 = 3, then 0 + 2 - 1 + 3 = 4."""
    rewards, values = torch.tensor([0.0, 100.0, 5.0]), torch.tensor([1.0, 100.0, 2.0])
    advantages, returns = gae(rewards, values, [3], lam=1.0, mask_N=torch.tensor([True, False, True]))
    assert advantages.tolist() == [4.0, 0.0, 3.0]
    assert returns.tolist() == [5.0, 0.0, 5.0]


@pytest.mark.parametrize("garbage", [0.0, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("padding", [1, 7])
def test_padding_is_as_if_it_were_not_there(garbage, side, padding):
    lengths, rewards, values, _ = ragged(seed=2, responses=6)
    alone, returns = gae(rewards, values, lengths)
    before, after = padding * (side != "right"), padding * (side != "left")

    def padded(x_N, fill):
        rows = [torch.nn.functional.pad(x, (before, after), value=fill) for x in x_N.split(lengths)]
        return torch.cat(rows)

    mask = padded(torch.ones(len(rewards)), 0.0).bool()
    found = gae(padded(rewards, garbage), padded(values, garbage), [n + before + after for n in lengths], mask_N=mask)
    torch.testing.assert_close(found[0][mask], alone, atol=0, rtol=0)
    torch.testing.assert_close(found[1][mask], returns, atol=0, rtol=0)
    assert not found[0][~mask].any()


def test_the_reward_of_a_response_is_the_sum_of_its_tokens():
    g = torch.Generator().manual_seed(3)
    lengths, old, reference = [2, 5, 1], torch.randn(8, generator=g), torch.randn(8, generator=g)
    scores = torch.tensor([10.0, 0.0, -10.0])
    by_token = token_rewards(scores, old, reference, lengths, 0.3)
    torch.testing.assert_close(
        response_rewards(scores, old, reference, lengths, 0.3), torch.stack([x.sum() for x in by_token.split(lengths)])
    )
    # By hand: -0.5 of KL costs 0.05 back, 1 of it 0.1.
    old, reference = torch.tensor([-1.0, -1.0, -2.0]), torch.tensor([-1.5, -2.0, -3.0])
    assert response_rewards(scores[:2], old, reference, [2, 1], 0.1).tolist() == pytest.approx([9.85, -0.1])


def test_a_response_without_a_token_is_refused():
    with pytest.raises(ValueError, match="no token"):
        token_rewards(torch.zeros(2), torch.zeros(3), torch.zeros(3), [3, 0], 0.1)


def whitened_by(ranks, x_N):
    """Every rank whitens its share in a thread of its own; reduce_sum meets the others as an all-reduce does."""
    barrier, shares, seen = threading.Barrier(ranks), x_N.tensor_split(ranks), {}

    def run(rank):
        def reduce_sum(sums):
            seen[rank] = sums
            barrier.wait()
            total = torch.stack([seen[r] for r in range(ranks)]).sum(0)
            barrier.wait()
            return total

        return whiten(shares[rank], moments(shares[rank], reduce_sum))

    with ThreadPoolExecutor(ranks) as pool:
        return torch.cat(list(pool.map(run, range(ranks))))


@pytest.mark.parametrize("tokens", [100, 3])  # of 3, one of four ranks has none
def test_whitening_does_not_know_how_many_ranks_there_are(tokens):
    x = torch.randn(tokens, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 5
    whole = (x - x.mean()) / (x.std() + 1e-8)
    for ranks in (1, 2, 4):
        torch.testing.assert_close(whitened_by(ranks, x), whole, atol=1e-12, rtol=0)
    alone = torch.cat([whiten(part, moments(part)) for part in x.tensor_split(2)])  # as Tülu 3's script did it
    assert (alone - whole).abs().max() > 0.01


RANK = """
import sys, torch
from tulu_lightning.core.advantages import moments, whiten
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
def reduce_sum(sums):
    torch.distributed.all_reduce(sums)
    return sums
x = torch.arange(10, dtype=torch.float64).square().tensor_split([3])[rank]
print(whiten(x, moments(x, reduce_sum)).tolist())
"""


def test_whitening_on_two_real_processes(tmp_path):
    """Squares of 0 to 9: mean 28.5; three of them on one rank, seven on the other."""
    command = [sys.executable, "-c", RANK]
    runs = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    found = [value for run in runs for value in json.loads(run.communicate(timeout=120)[0])]
    squares = [float(n * n) for n in range(10)]
    deviation = statistics.stdev(squares) + 1e-8
    assert found == pytest.approx([(x - 28.5) / deviation for x in squares], abs=1e-12)
