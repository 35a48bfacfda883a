"""At a vocabulary of 128k and 8k tokens, the loss needs less than a tenth of what the logits would take."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tulu_lightning.core.logprobs import token_logprobs
from tulu_lightning.core.nll import weighted_nll

ROWS, VOCABULARY, WIDTH = 8192, 131072, 8
LOGITS = ROWS * VOCABULARY * 4
"""Bytes of all logits in fp32: 4 GiB."""


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that are still there, and their peak."""

    def __init__(self):
        super().__init__()
        self.known, self.bytes, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage(), given)
        return out

    def count(self, storage, given):
        key = storage._cdata
        if key in self.known or key in given:  # a view, or an operation in place
            return
        self.known[key] = size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self.free, key)

    def free(self, key):
        self.bytes -= self.known.pop(key, 0)


def inputs(rows, vocabulary):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=g).requires_grad_()
    head = torch.randn(vocabulary, WIDTH, generator=g).requires_grad_()
    return hidden, head, torch.randint(0, vocabulary, (rows,), generator=g)


LOSSES = {
    "logprobs": lambda hidden, head, target: token_logprobs(hidden, head, target).logp_N.sum(),
    "nll": lambda hidden, head, target: weighted_nll(hidden, head, target, torch.ones(len(target))).loss,
    "plain": lambda hidden, head, target: F.cross_entropy(hidden @ head.T, target, reduction="sum"),
}


def peak(name, rows, vocabulary):
    """Bytes at the peak of forward and backward, the gradients of the inputs left out."""
    hidden, head, target = inputs(rows, vocabulary)
    with Live() as live:
        LOSSES[name](hidden, head, target).backward()
    return live.peak - sum(x.grad.untyped_storage().nbytes() for x in (hidden, head))


@pytest.mark.parametrize("name", ["logprobs", pytest.param("nll", marks=pytest.mark.slow)])
def test_the_peak_is_under_a_tenth_of_the_logits_of_8k_tokens_at_a_vocabulary_of_128k(name):
    assert peak(name, ROWS, VOCABULARY) < LOGITS / 10


def test_the_count_sees_the_plain_version():
    assert peak("plain", 256, 4096) >= 2 * 256 * 4096 * 4, "the logits and their gradient"


@pytest.mark.parametrize("factor", [1, 2])
def test_the_head_has_one_gradient_and_no_copy_of_it(factor):
    """Where the head is wide its gradient is the largest tensor of a step: a copy beside it would double that."""
    g = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(rows, 512, generator=g).requires_grad_() for rows in (64, 16384))
    target, weight = torch.randint(0, 16384, (64,), generator=g), torch.ones(64)
    with Live() as live:
        (factor * weighted_nll(hidden, head, target, weight, chunk_bytes=1 << 20).loss).backward()
    assert live.peak < 1.5 * head.numel() * 4


def test_its_gradients_are_for_one_backward():
    hidden, head, target = inputs(4, 16)
    loss = weighted_nll(hidden, head, target, torch.ones(4)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()
