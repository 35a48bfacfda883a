"""What a preference step reports of each pair, worked out."""

import pytest
import torch

from tulu_lightning.core.preference import DPO, Pair, PairLoss, SimPO, pair_metrics

NAMES = [
    "loss",
    "rewards_chosen",
    "rewards_rejected",
    "margin",
    "accuracy",
    "logp_chosen",
    "logp_rejected",
    "length_chosen",
    "length_rejected",
]
# Two pairs. Log-ratios: chosen 2 and -4, rejected -1 and 3; per token 0.5 and -1, -0.5 and 1.
POLICY = Pair(torch.tensor([-2.0, -9.0]), torch.tensor([-3.0, -2.0]))
REFERENCE = Pair(torch.tensor([-4.0, -5.0]), torch.tensor([-2.0, -5.0]))
LENGTHS = Pair(torch.tensor([4.0, 4.0]), torch.tensor([2.0, 3.0]))


def test_two_pairs_worked_out():
    terms = DPO(beta=2.0)(POLICY, REFERENCE, LENGTHS)
    found = {name: values_B.tolist() for name, values_B in pair_metrics(POLICY, REFERENCE, LENGTHS, terms).items()}
    assert found == {
        "loss": terms.loss_B.tolist(),
        "rewards_chosen": [1.0, -2.0],
        "rewards_rejected": [-1.0, 2.0],
        "margin": [2.0, -4.0],
        "accuracy": [1.0, 0.0],
        "logp_chosen": [-2.0, -9.0],
        "logp_rejected": [-3.0, -2.0],
        "length_chosen": [4.0, 4.0],
        "length_rejected": [2.0, 3.0],
        "kl_chosen": [0.5, -1.0],
        "kl_rejected": [-0.5, 1.0],
    }
    assert list(found) == [*NAMES, "kl_chosen", "kl_rejected"]


def test_the_kl_is_per_token_whatever_the_loss_normalises():
    terms = DPO(beta=0.1, length_normalised=False)(POLICY, REFERENCE, LENGTHS)
    metrics = pair_metrics(POLICY, REFERENCE, LENGTHS, terms)
    assert metrics["kl_chosen"].tolist() == [0.5, -1.0]
    assert metrics["rewards_chosen"].tolist() == pytest.approx([0.2, -0.4])


def test_without_a_reference_there_is_no_kl():
    assert list(pair_metrics(POLICY, None, LENGTHS, SimPO()(POLICY, None, LENGTHS))) == NAMES


def test_equal_rewards_are_not_right():
    zero = torch.zeros(1)
    terms = PairLoss(zero, Pair(zero, zero))
    assert pair_metrics(Pair(zero, zero), None, Pair(zero + 1, zero + 1), terms)["accuracy"].tolist() == [0.0]


def test_a_metric_holds_no_graph():
    policy = Pair(*(side_B.clone().requires_grad_() for side_B in POLICY))
    metrics = pair_metrics(policy, REFERENCE, LENGTHS, DPO()(policy, REFERENCE, LENGTHS))
    assert not any(values_B.requires_grad for values_B in metrics.values())
