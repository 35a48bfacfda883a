"""The log-prob function that never holds all logits, against the plain one; its memory is in test_loss_memory."""

import math

import pytest
import torch

from tulu_lightning.core import logprobs
from tulu_lightning.core.logprobs import token_logprobs


def plain(hidden, head, target, temperature):
    logp = torch.log_softmax(hidden @ head.T / temperature, -1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def inputs(rows=37, width=16, vocab=50, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, width, generator=g, dtype=dtype).requires_grad_()
    head = torch.randn(vocab, width, generator=g, dtype=dtype).requires_grad_()
    return hidden, head, torch.randint(0, vocab, (rows,), generator=g)


def test_two_logits_by_hand():
    # Logits (0, ln 3): p = (1/4, 3/4); entropy = ln 4 - 3/4 ln 3.
    stats = token_logprobs(torch.ones(1, 1), torch.tensor([[0.0], [math.log(3)]]), torch.tensor([1]), entropy=True)
    assert stats.logp_N.item() == pytest.approx(math.log(3 / 4), abs=1e-6)
    assert stats.entropy_N.item() == pytest.approx(math.log(4) - 0.75 * math.log(3), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tile_bytes", [1, 37 * 4 * 256, 1 << 20])
def test_values_and_gradients_equal_the_plain_version_for_any_upstream_gradient(temperature, tile_bytes):
    """Tiles of 128 (the least), 256 and all 300 tokens of the vocabulary."""
    hidden, head, target = inputs(vocab=300, dtype=torch.float32)
    up = torch.randn(37, generator=torch.Generator().manual_seed(2))
    stats = token_logprobs(hidden, head, target, temperature, entropy=True, tile_bytes=tile_bytes)
    (stats.logp_N @ up + stats.entropy_N @ up.flip(0)).backward()
    ours = hidden.grad.clone(), head.grad.clone()
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    logp, entropy = plain(*exact, target, temperature)
    (logp @ up.double() + entropy @ up.double().flip(0)).backward()
    expected = logp, entropy, exact[0].grad, exact[1].grad
    for found, right in zip((stats.logp_N, stats.entropy_N, *ours), expected, strict=True):
        assert (found - right).abs().max() <= 1e-5 * right.abs().max()


def test_bf16_products_give_fp32_numbers():
    hidden, head, target = inputs(dtype=torch.float32)
    stats = token_logprobs(hidden.bfloat16(), head, target)
    assert stats.logp_N.dtype == torch.float32
    torch.testing.assert_close(stats.logp_N, plain(hidden, head, target, 1.0)[0], atol=0.2, rtol=0.02)
    stats.logp_N.sum().backward()
    assert head.grad.dtype == torch.float32


@pytest.mark.parametrize("entropy", [False, True])
def test_tokens_without_an_upstream_gradient_are_left_out_of_backward_and_change_nothing(entropy, monkeypatch):
    hidden, head, target = inputs(dtype=torch.float32)
    up = torch.randn(37, generator=torch.Generator().manual_seed(2))
    up[::3] = 0  # as PPO's clipped tokens
    computed = []
    tiles = logprobs._tiles
    monkeypatch.setattr(logprobs, "_tiles", lambda own, *more: computed.append(len(own)) or tiles(own, *more))
    stats = token_logprobs(hidden, head, target, entropy=entropy)
    loss = stats.logp_N @ up + (stats.entropy_N @ up if entropy else 0)
    loss.backward()
    assert computed == [37, 24]
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    logp, entropies = plain(*exact, target, 1.0)
    (logp @ up.double() + (entropies @ up.double() if entropy else 0)).backward()
    for found, right in zip((hidden, head), exact, strict=True):
        assert (found.grad - right.grad).abs().max() <= 1e-5 * right.grad.abs().max()
    hidden.grad = head.grad = None
    token_logprobs(hidden, head, target).logp_N.mul(0).sum().backward()
    assert not hidden.grad.any()
    assert not head.grad.any(), "a filler: gradients of 0, nothing computed"
    assert computed[2:] == [37]


def test_a_second_backward_gets_the_gradient_of_entropies_that_the_first_had_no_use_for():
    torch.manual_seed(0)
    hidden_ND, head_VD, target_N = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8), torch.arange(4)
    stats = token_logprobs(hidden_ND, head_VD, target_N, entropy=True)
    assert stats.entropy_N is not None
    torch.autograd.grad(stats.logp_N.sum(), hidden_ND, retain_graph=True)
    (found,) = torch.autograd.grad(stats.entropy_N.sum(), hidden_ND)
    logp_NV = (hidden_ND @ head_VD.T).log_softmax(-1)
    (expected,) = torch.autograd.grad(-(logp_NV.exp() * logp_NV).sum(), hidden_ND)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_theirs():
    """LoRA: the head is not trained."""
    hidden, head, target = inputs(dtype=torch.float32)
    token_logprobs(hidden, head.detach(), target).logp_N.sum().backward()
    found = hidden.grad
    other = hidden.detach().requires_grad_()
    plain(other, head, target, 1.0)[0].sum().backward()
    torch.testing.assert_close(found, other.grad, rtol=1e-5, atol=1e-5)


def test_a_temperature_of_zero_is_refused():
    hidden, head, target = inputs()
    with pytest.raises(ValueError, match="temperature is 0"):
        token_logprobs(hidden, head, target, temperature=0.0)


def test_no_scored_token_at_all_gives_no_log_prob_and_no_gradient():
    hidden, head = torch.zeros(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    stats = token_logprobs(hidden, head, torch.zeros(0, dtype=torch.int64))
    assert stats.logp_N.shape == (0,)
    stats.logp_N.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_without_any_gradient_give_zeros_of_the_right_dtype(dtype):
    hidden_ND, head_VD = torch.randn(5, 8).to(dtype).requires_grad_(), torch.randn(11, 8, requires_grad=True)
    stats = token_logprobs(hidden_ND, head_VD, torch.arange(5), entropy=True)
    (stats.logp_N * 0).sum().backward()
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.dtype == dtype
    assert not hidden_ND.grad.any()
    assert head_VD.grad is not None
    assert not head_VD.grad.any()
