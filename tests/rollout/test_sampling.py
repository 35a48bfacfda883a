import math

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from tulu_lightning.rollout.sampling import filtered, pick, uniforms


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


def slow_distribution(logits: list[float], temperature: float, top_p: float, top_k: int) -> list[float]:
    """One row in float64, entry by entry: temperature, then top-k, then top-p of what is left, renormalised."""
    weight = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(weight)), key=lambda i: -weight[i])
    if top_k:
        order = [i for i in order if weight[i] >= weight[order[min(top_k, len(order)) - 1]]]
    total, kept, mass = sum(weight[i] for i in order), [], 0.0
    for i in order:
        if not kept or mass < top_p * total:
            kept.append(i)
        mass += weight[i]
    total = sum(weight[i] for i in kept)
    return [weight[i] / total if i in kept else 0.0 for i in range(len(weight))]


FILTERS = [(1.0, 0), (0.7, 0), (1.0, 4), (0.6, 7), (0.05, 0), (1.0, 1), (0.95, 10**6)]


@pytest.mark.parametrize("vocabulary", [40, 256, 700])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize(("top_p", "top_k"), FILTERS)
def test_the_token_and_its_log_prob_are_those_of_a_slow_version(vocabulary, temperature, top_p, top_k):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(25, vocabulary, generator=generator)
    uniform = torch.rand(25, generator=generator)
    token, logp = pick(logits, temperature, uniform, top_p, top_k)
    for row in range(25):
        p = slow_distribution(logits[row].tolist(), temperature, top_p, top_k)
        below = math.fsum(p[: token[row]])
        assert p[token[row]] > 0
        assert below - 1e-5 <= uniform[row] <= below + p[token[row]] + 1e-5
        assert logp[row].item() == pytest.approx(math.log(p[token[row]]), abs=1e-4)


@pytest.mark.parametrize(("top_p", "top_k"), FILTERS)
def test_filters_are_those_of_transformers(top_p, top_k):
    logits = 3 * torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    expected = logits
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(filtered(logits, top_p, top_k), expected)


def test_tokens_that_tie_with_the_last_of_top_k_stay():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert torch.isfinite(filtered(logits, 1.0, 2)).tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize("vocabulary", [255, 256, 257, 512, 49152])
def test_every_uniform_number_lands_on_a_token_of_its_mass(vocabulary):
    generator = torch.Generator().manual_seed(1)
    logits = 6 * torch.randn(1, vocabulary, generator=generator)
    uniform = torch.cat([torch.linspace(0, 1 - 2**-24, 400), torch.tensor([1 - 2**-24])])
    token, _ = pick(logits.expand(401, -1), 1.0, uniform)
    mass = torch.softmax(logits[0].double(), -1).cumsum(0)
    low, high = torch.cat([torch.zeros(1, dtype=torch.float64), mass[:-1]])[token], mass[token]
    assert ((uniform >= low - 1e-5) & (uniform <= high + 1e-5)).all()
    assert token.sort().values.equal(token)


def test_greedy_takes_no_notice_of_filters():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    plain, filtered_out = pick(logits, 0.0, torch.zeros(4)), pick(logits, 0.0, torch.zeros(4), 0.5, 2)
    assert torch.equal(plain[0], filtered_out[0])
    assert torch.equal(plain[1], filtered_out[1])
