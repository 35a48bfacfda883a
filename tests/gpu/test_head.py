"""The head's log-probs and its SFT loss on a GPU: right in bf16 and fp32, small, and liger's where it is the faster one."""

import pytest
import torch
import torch.nn.functional as F

from tulu_lightning.core.logprobs import token_logprobs
from tulu_lightning.core.nll import weighted_nll
from tulu_lightning.models.liger import head_loss

pytestmark = pytest.mark.gpu
LOSSES = {
    "logprobs": lambda hidden, head, target, weight: -(weight * token_logprobs(hidden, head, target).logp_N).sum(),
    "nll": lambda hidden, head, target, weight: weighted_nll(hidden, head, target, weight).loss,
}


def inputs(rows, vocabulary, width, device, dtype):
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, generator=g, device=device).to(dtype).requires_grad_()
    head = (torch.randn(vocabulary, width, generator=g, device=device) / width**0.5).requires_grad_()
    target = torch.randint(0, vocabulary, (rows,), generator=g, device=device)
    return hidden, head, target, 0.5 + torch.rand(rows, generator=g, device=device)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_those_of_fp64(name, dtype, tolerance, device):
    given = inputs(300, 5000, 64, device, dtype)
    loss = LOSSES[name](*given)
    loss.backward()
    hidden, head = (x.detach().cpu().double().requires_grad_() for x in given[:2])
    logp = (hidden @ head.T).log_softmax(-1).gather(1, given[2].cpu()[:, None])[:, 0]
    wanted = -(given[3].cpu() * logp).sum()
    wanted.backward()
    assert float(loss) == pytest.approx(float(wanted), rel=tolerance)
    for ours, theirs in ((given[0], hidden), (given[1], head)):
        assert (ours.grad.cpu().double() - theirs.grad).norm() <= tolerance * theirs.grad.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_8k_tokens_at_a_vocabulary_of_128k_take_less_than_a_tenth_of_the_logits(name, device):
    if device.type != "cuda":
        pytest.skip("counts a GPU's memory")
    hidden, head, target, weight = inputs(8192, 128256, 2048, device, torch.bfloat16)
    LOSSES[name](hidden, head, target, weight).backward()
    hidden.grad = head.grad = None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    LOSSES[name](hidden, head, target, weight).backward()
    taken = torch.cuda.max_memory_allocated(device) - before
    gradients = sum(x.grad.numel() * x.grad.element_size() for x in (hidden, head))
    copy = head.numel() * 2  # of the head in bf16, which the products are made with
    assert taken - gradients - copy < 8192 * 128256 * 4 / 10, f"{(taken - gradients - copy) / 1e6:.0f} MB"


def test_the_loss_that_is_chosen_is_right(device):
    hidden, head, target, weight = inputs(2048, 32000, 512, device, torch.bfloat16)
    chosen = head_loss(hidden, head, target)(hidden, head, target, weight)
    plain = F.cross_entropy(hidden.detach().float() @ head.detach().T, target, reduction="none")
    assert float(chosen.loss.detach()) == pytest.approx(float((weight * plain).sum()), rel=1e-2)
    torch.testing.assert_close(chosen.logp_N, -plain, atol=5e-2, rtol=2e-2)
