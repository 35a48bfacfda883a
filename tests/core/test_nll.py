"""The weighted loss with its gradient made on the way is the log-prob function, weighted and summed."""

import pytest
import torch
import torch.nn.functional as F

from tulu_lightning.core import nll
from tulu_lightning.core.logprobs import token_logprobs
from tulu_lightning.core.nll import compiled_finish, weighted_nll


def inputs(rows=37, width=16, vocabulary=300):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, width, generator=g).requires_grad_()
    head = torch.randn(vocabulary, width, generator=g).requires_grad_()
    weight = torch.rand(rows, generator=g)
    weight[::5] = 0
    return hidden, head, torch.randint(0, vocabulary, (rows,), generator=g), weight


@pytest.mark.parametrize("chunk_bytes", [1, 8 * 300 * 4, 1 << 20])
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_loss_and_gradients_equal_cross_entropy(chunk_bytes, block_bytes, monkeypatch):
    monkeypatch.setitem(nll.BLOCK_BYTES, "cpu", block_bytes)
    hidden, head, target, weight = inputs()
    result = weighted_nll(hidden, head, target, weight, chunk_bytes)
    (3 * result.loss).backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    nll_N = F.cross_entropy(exact[0] @ exact[1].T, target, reduction="none")
    expected = (weight * nll_N).sum()
    (3 * expected).backward()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(result.logp_N.double()[weight > 0], -nll_N[weight > 0], atol=1e-5, rtol=1e-5)
    for found, right in zip((hidden, head), exact, strict=True):
        assert (found.grad - right.grad).abs().max() <= 1e-5 * right.grad.abs().max()


def test_in_bf16_it_is_the_log_prob_function_to_the_rounding_of_the_products():
    hidden, head, target, weight = inputs()
    low = hidden.detach().bfloat16().requires_grad_()
    found = weighted_nll(low, head, target, weight)
    found.loss.backward()
    mine = low.grad.float(), head.grad.clone()
    low.grad = head.grad = None
    expected = token_logprobs(low, head, target)
    (-(weight * expected.logp_N).sum()).backward()
    assert head.grad.dtype == torch.float32
    torch.testing.assert_close(found.logp_N[weight > 0], expected.logp_N.detach()[weight > 0], atol=1e-5, rtol=1e-5)
    for a, b in zip(mine, (low.grad.float(), head.grad), strict=True):
        assert (a - b).norm() <= 2**-7 * b.norm()


@pytest.mark.slow  # the compiler takes a minute
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_the_same(dtype):
    hidden, head, target, weight = inputs()
    results = []
    for finish in ({}, {"finish": compiled_finish}):
        low = hidden.detach().to(dtype).requires_grad_()
        head.grad = None
        found = weighted_nll(low, head, target, weight, chunk_bytes=8 * 300 * 4, **finish)
        found.loss.backward()
        results.append((found.loss.detach(), found.logp_N, low.grad.float(), head.grad.clone()))
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    for plain, compiled in zip(*results, strict=True):
        assert (plain - compiled).norm() <= tolerance * plain.norm()


def test_weights_of_zero_compute_nothing_and_still_give_gradients_for_the_collectives():
    hidden, head, target, _ = inputs()
    result = weighted_nll(hidden, head, target, torch.zeros(37), finish=lambda *_: pytest.fail("was computed"))
    result.loss.backward()
    assert result.loss.item() == 0
    assert not hidden.grad.any()
    assert not head.grad.any()


@pytest.mark.parametrize("frozen", ["head", "hidden", "both", "no_grad"])
def test_only_the_gradients_that_are_needed_are_made(frozen, monkeypatch):
    hidden, head, target, weight = inputs()
    asked = []
    run = nll._run
    monkeypatch.setattr(nll, "_run", lambda *args: asked.append([x is not None for x in args[4:6]]) or run(*args))
    own_hidden = hidden.detach() if frozen in ("hidden", "both") else hidden
    own_head = head.detach() if frozen in ("head", "both") else head
    with torch.set_grad_enabled(frozen != "no_grad"):
        loss = weighted_nll(own_hidden, own_head, target, weight).loss
    assert asked == [[frozen == "head", frozen == "hidden"]]
    assert loss.requires_grad == (frozen in ("head", "hidden"))
    if loss.requires_grad:
        loss.backward()
        assert (hidden.grad is None, head.grad is None) == (frozen == "hidden", frozen == "head")
