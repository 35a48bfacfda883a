import math

import pytest
import torch

from tulu_lightning.rollout.sampling import pick, uniforms


def test_the_uniform_number_selects_by_cumulative_mass():
    # Probabilities 1/2, 1/4, 1/4: [0, 1/2) -> 0, [1/2, 3/4) -> 1, [3/4, 1) -> 2.
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]])).expand(5, 3)
    token, logp = pick(logits, 1.0, torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76]))
    assert token.tolist() == [0, 0, 1, 1, 2]
    assert logp.tolist() == pytest.approx([math.log(0.5)] * 2 + [math.log(0.25)] * 3)


def test_log_probs_are_those_of_the_tempered_distribution():
    # Logits 0 and ln 4 at temperature 2 are 0 and ln 2: probabilities 1/3 and 2/3.
    logits = torch.tensor([[0.0, math.log(4)]]).expand(2, 2)
    token, logp = pick(logits, 2.0, torch.tensor([0.32, 0.34]))
    assert token.tolist() == [0, 1]
    assert logp.tolist() == pytest.approx([math.log(1 / 3), math.log(2 / 3)])


def test_temperature_zero_is_greedy_with_untempered_log_probs():
    token, logp = pick(torch.tensor([[0.0, math.log(3)]]), 0.0, torch.tensor([0.0]))
    assert token.item() == 1
    assert logp.item() == pytest.approx(math.log(0.75))


def test_a_token_without_probability_is_never_picked():
    largest = 1 - 2**-24  # the largest float32 below 1
    logits = torch.full((3, 50_000), -math.inf)
    logits[:, 1000:1300] = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    token, logp = pick(logits, 1.0, torch.tensor([0.0, 0.5, largest]))
    assert torch.isfinite(logp).all()
    assert ((token >= 1000) & (token < 1300)).all()


def test_frequencies_follow_the_probabilities():
    n, p = 20_000, torch.tensor([0.6, 0.3, 0.1])
    token, _ = pick(p.log().expand(n, 3), 1.0, torch.rand(n, generator=torch.Generator().manual_seed(0)))
    share = token.bincount(minlength=3) / n
    assert ((share - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()


def test_the_logits_are_left_as_they_were():
    logits = torch.randn(2, 9)
    before = logits.clone()
    pick(logits, 0.7, torch.rand(2))
    assert torch.equal(logits, before)


def test_a_row_owns_its_random_numbers():
    three = uniforms(5, [(0, 0), (0, 1), (7, 0)], 4)
    assert torch.equal(uniforms(5, [(7, 0)], 4), three[2:])
    assert not torch.equal(three[0], three[1])
    assert not torch.equal(uniforms(6, [(7, 0)], 4), three[2:])
    assert ((three >= 0) & (three < 1)).all()
