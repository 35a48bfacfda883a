"""Which token counts how much: by hand, against plain loops over responses, and under any split."""

import math

import pytest
import torch

from tulu_lightning.core.aggregate import denominator, token_weights
from tulu_lightning.core.groups import GRPO
from tulu_lightning.core.kl import kl_loss
from tulu_lightning.core.policy import ClippedPolicy
from tulu_lightning.errors import InputError

KINDS = ["token", "sequence", "constant"]


@pytest.mark.parametrize(
    ("kind", "weights", "divisor", "loss"),
    [
        # Losses 6 | 1, 2, 3 of two responses. Mean over tokens: 12/4; over responses' means: (6 + 2)/2; 12/(2 · 8).
        ("token", [1, 1, 1, 1], 4.0, 3.0),
        ("sequence", [1, 1 / 3, 1 / 3, 1 / 3], 2.0, 4.0),
        ("constant", [1, 1, 1, 1], 16.0, 0.75),
    ],
)
def test_two_responses_by_hand(kind, weights, divisor, loss):
    weight_N = token_weights([1, 3], kind)
    assert weight_N.tolist() == pytest.approx(weights)
    assert denominator(kind, tokens=4, responses=2, constant=8) == divisor
    assert float((weight_N * torch.tensor([6.0, 1.0, 2.0, 3.0])).sum()) / divisor == pytest.approx(loss)


def slow_grpo(responses, groups, scores, kind, beta, clip, limit):
    """GRPO's whole loss in plain Python: each response a list of (log π, log π_old, log π_ref)."""
    means, tokens, total = [], 0, 0.0
    for response, group, score in zip(responses, groups, scores, strict=True):
        own = [s for s, other in zip(scores, groups, strict=True) if other == group]
        mean = sum(own) / len(own)
        deviation = math.sqrt(sum((s - mean) ** 2 for s in own) / (len(own) - 1))
        advantage = (score - mean) / (deviation + 1e-8)
        losses = []
        for logp, old, reference in response:
            ratio, d = math.exp(logp - old), logp - reference
            held = min(max(ratio, 1 - clip), 1 + clip)
            losses.append(-min(ratio * advantage, held * advantage) + beta * (math.exp(-d) - 1 + d))
        means.append(sum(losses) / len(losses))
        total, tokens = total + sum(losses), tokens + len(losses)
    return {
        "token": total / tokens,
        "sequence": sum(means) / len(means),
        "constant": total / (len(responses) * limit),
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_loss_of_grpo_equals_plain_python(kind):
    g = torch.Generator().manual_seed(0)
    groups, lengths = [i for i in range(6) for _ in range(4)], torch.randint(1, 9, (24,), generator=g).tolist()
    scores = (10.0 * torch.randint(0, 2, (24,), generator=g)).double()
    scores[::4], scores[1::4] = 10.0, 0.0  # each group has a signal
    logp, old, reference = -torch.rand(3, sum(lengths), generator=g, dtype=torch.float64)
    responses = [
        torch.stack(x, 1).tolist() for x in zip(*(x.split(lengths) for x in (logp, old, reference)), strict=True)
    ]
    expected = slow_grpo(responses, groups, scores.tolist(), kind, 0.3, 0.2, 16)

    advantages_N = GRPO()(scores, torch.tensor(groups)).repeat_interleave(torch.tensor(lengths))
    loss_N = ClippedPolicy()(logp, old, advantages_N).loss_N + 0.3 * kl_loss(logp, reference, "k3")
    weight_N = token_weights(lengths, kind).double()
    found = (weight_N * loss_N).sum() / denominator(kind, len(logp), len(lengths), 16)
    assert float(found) == pytest.approx(expected, abs=1e-7 if kind == "sequence" else 1e-9)  # weights are fp32


@pytest.mark.parametrize("kind", KINDS)
def test_no_split_of_the_responses_changes_the_sum(kind):
    lengths, losses = [3, 1, 5, 2], torch.arange(11.0)
    whole = (token_weights(lengths, kind) * losses).sum()
    parts = zip((lengths[:1], lengths[1:3], lengths[3:]), losses.split([3, 6, 2]), strict=True)
    assert float(sum((token_weights(own, kind) * part).sum() for own, part in parts)) == pytest.approx(float(whole))


def test_no_response_has_no_weight():
    assert [token_weights([], kind).tolist() for kind in KINDS] == [[], [], []]


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="aggregation"):
        token_weights([1], "mean")
    with pytest.raises(InputError, match="aggregation"):
        denominator("mean", 1, 1, 1)
