"""Gradients that are added where they are made are those that autograd would have added."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tulu_lightning.core import nll as core_nll
from tulu_lightning.core.gradients import accumulating, room_for
from tulu_lightning.core.logprobs import token_logprobs
from tulu_lightning.core.matmul import low_linear
from tulu_lightning.core.nll import weighted_nll
from tulu_lightning.models.layers import embed, gated_mlp

ROWS, VOCABULARY, WIDTH = 6, 300, 8


def table():
    return torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()


def micro_batch(seed):
    g = torch.Generator().manual_seed(seed)
    ids, target = (torch.randint(0, VOCABULARY, (ROWS,), generator=g) for _ in range(2))
    return ids, target, torch.rand(ROWS, generator=g)


def nll(hidden, head, target, weight):
    return weighted_nll(hidden, head, target, weight).loss


def logprobs(hidden, head, target, weight):
    return -(weight * token_logprobs(hidden, head, target).logp_N).sum()


def tied_steps(loss, on, micro_batches=3):
    """The gradient of a table that is both embedding and head, and which tensor held it after each micro-batch."""
    weight, held = table(), []
    for seed in range(micro_batches):
        ids, target, weights = micro_batch(seed)
        with accumulating(on):
            loss(torch.tanh(embed(ids, weight, padding=int(ids[0]))), weight, target, weights).backward()
        held.append(weight.grad.data_ptr())
    return weight.grad, held


@pytest.mark.parametrize("loss", [nll, logprobs])
def test_a_table_that_is_embedding_and_head_gets_the_sum_of_all_its_gradients(loss):
    plain, _ = tied_steps(loss, on=False)
    added, held = tied_steps(loss, on=True)
    assert plain.abs().max() > 0.1
    torch.testing.assert_close(added, plain, rtol=1e-6, atol=1e-6)
    assert len(set(held)) == 1


def layers(x, weights):
    """Each weight once by itself and once in a gated MLP."""
    gate, up, down = weights
    inner = low_linear(low_linear(x, gate, gate.detach().to(x.dtype)), down, down.detach().to(x.dtype))
    low = tuple(weight.detach().to(x.dtype) for weight in weights)
    return gated_mlp(inner, (gate, up, down), low).float().square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_added_to_the_sum_of_those_before(dtype):
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(5, 16, generator=g).to(dtype) for _ in range(3)]
    start = [torch.randn(shape, generator=g) / 4 for shape in ((32, 16), (32, 16), (16, 32))]
    results = []
    for on in (False, True):
        weights = [weight.clone().requires_grad_() for weight in start]
        first = []
        for x in batches:
            with accumulating(on):
                layers(x, weights).backward()
            first.append([weight.grad.data_ptr() for weight in weights])
        assert first[1] == first[2], "the sum moved"
        results.append([weight.grad for weight in weights])
    for plain, added in zip(*results, strict=True):
        assert plain.abs().max() > 1
        torch.testing.assert_close(added, plain, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-3)


class Sizes(TorchDispatchMode):
    """How many tensors of the table's size are made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == VOCABULARY * WIDTH and not _given(out, args):
            self.made.append(str(func))
        return out


def _given(out, args):
    return any(isinstance(x, torch.Tensor) and x.untyped_storage()._cdata == out.untyped_storage()._cdata for x in args)


@pytest.mark.parametrize("on", [True, False])
def test_a_second_micro_batch_makes_no_tensor_of_the_tables_size(on, monkeypatch):
    monkeypatch.setitem(core_nll.HEAD_BYTES, "cpu", 4 * WIDTH * 64)  # the head's gradient in runs of 64 rows
    weight = table()
    for seed in range(2):
        ids, target, weights = micro_batch(seed)
        with Sizes() as sizes, accumulating(on):
            nll(torch.tanh(embed(ids, weight)), weight, target, weights).backward()
    if on:
        assert not sizes.made
    else:
        assert len(sizes.made) >= 2, "zeros for the embedding's and for the head's gradient"


def test_there_is_room_for_what_nobody_else_waits_for():
    weight = table()
    assert room_for(weight) is None, "not asked for"
    with accumulating():
        room = room_for(weight)
        assert room is weight.grad
        assert not room.any()
        assert room_for(weight.detach()) is None, "frozen"
        assert room_for(weight * 1) is None, "not a leaf"
        assert room_for(weight.detach().bfloat16().requires_grad_()) is None, "small parts would be rounded away"
        with accumulating(False):
            assert room_for(weight) is None
        weight.register_post_accumulate_grad_hook(lambda parameter: None)
        assert room_for(weight) is None
        hooked = table()
        hooked.register_hook(lambda grad: grad)
        assert room_for(hooked) is None
    assert room_for(table()) is None


def test_a_loss_that_was_added_already_is_not_multiplied_afterwards():
    weight = table()
    _, target, weights = micro_batch(0)
    hidden = torch.ones(ROWS, WIDTH, requires_grad=True)
    with accumulating():
        loss = nll(hidden, weight, target, weights)
        with pytest.raises(RuntimeError, match=r"added already.*multiplied by 2.0: put the factor into the weights"):
            (2 * loss).backward()


def test_a_frozen_head_leaves_its_hidden_states_their_gradient():
    weight = table().detach()
    _, target, weights = micro_batch(0)
    hidden = torch.ones(ROWS, WIDTH, requires_grad=True)
    with accumulating():
        nll(hidden, weight, target, weights).backward()
    assert hidden.grad.abs().sum() > 0
    assert weight.grad is None
