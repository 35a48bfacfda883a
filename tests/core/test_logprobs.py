"""The chunked log-prob function against the plain one, and its memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
@pytest.mark.parametrize("chunk", [1, 8, 37, 64])
def test_values_and_gradients_equal_the_plain_version_for_any_upstream_gradient(temperature, chunk):
    hidden, head, target = inputs(dtype=torch.float32)
    up = torch.randn(37, generator=torch.Generator().manual_seed(2))
    stats = token_logprobs(hidden, head, target, temperature, entropy=True, chunk=chunk)
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


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made, in elements."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_no_tensor_of_all_logits_is_ever_made():
    rows, vocab, chunk = 640, 3000, 32
    hidden, head, target = inputs(rows, 8, vocab, torch.float32)
    with Largest() as largest:
        token_logprobs(hidden, head, target, chunk=chunk).logp_N.sum().backward()
    assert largest.elements <= chunk * vocab < rows * vocab / 10
    with Largest() as largest:  # the counter does see the plain version's
        plain(hidden, head, target, 1.0)[0].sum().backward()
    assert largest.elements == rows * vocab


def test_a_temperature_of_zero_is_refused():
    hidden, head, target = inputs()
    with pytest.raises(ValueError, match="temperature is 0"):
        token_logprobs(hidden, head, target, temperature=0.0)
