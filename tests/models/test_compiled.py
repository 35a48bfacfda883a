"""The compiled functions of training against PyTorch's operators, each alone, forward and backward."""

import math
from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tulu_lightning.core.logprobs import RowSlopes, token_logprobs
from tulu_lightning.core.nll import weighted_nll
from tulu_lightning.models import compiled, layers
from tulu_lightning.models.backends import _numbers
from tulu_lightning.models.compiled import LayerKernels, layer_kernels
from tulu_lightning.models.segments import CompiledSegments, _Cut, segment_kernels
from tulu_lightning.models.tiles import SdpaTiles
from tulu_lightning.types import Span

FP32, BF16 = torch.float32, torch.bfloat16
CLOSE = {FP32: {"rtol": 1e-5, "atol": 1e-5}, BF16: {"rtol": 1e-2, "atol": 2e-2}}
pytestmark = pytest.mark.skipif(layer_kernels() is None, reason="no C++ compiler")


@pytest.fixture(params=[FP32, BF16], ids=["fp32", "bf16"])
def dtype(request):
    torch.manual_seed(0)
    return request.param


def made() -> LayerKernels:
    found = layer_kernels()
    assert found is not None
    return found


def grads(plain: Tensor, *leaves: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(plain, leaves, upstream.float())


@pytest.mark.parametrize("width", [16, 48, 576])
@pytest.mark.parametrize("to", [FP32, BF16])
def test_norms_forward_and_backward(dtype, to, width):
    if (dtype, to) not in compiled.NORMS:
        pytest.skip("layers have no use for it")
    x, weight, up = torch.randn(2, 37, width).to(dtype), torch.rand(width), torch.randn(2, 37, width).to(to)
    wide, leaf = x.float().requires_grad_(), weight.clone().requires_grad_()
    plain = F.rms_norm(wide, (width,), leaf, 1e-5)
    out, inverse = made().norm(x, weight, 1e-5, to)
    assert (out.dtype, inverse.shape) == (to, (74,))
    torch.testing.assert_close(out, plain.to(to), **CLOSE[to])
    grad_x, grad_weight = made().norm_back(up, x, weight, inverse)
    expected_x, expected_weight = grads(plain, wide, leaf, upstream=up)
    torch.testing.assert_close(grad_x, expected_x.to(dtype), **CLOSE[dtype])
    torch.testing.assert_close(grad_weight, expected_weight, rtol=1e-4, atol=1e-4)


def test_gates_forward_and_backward(dtype):
    gate, up, down = (torch.randn(5, 4112).to(dtype) for _ in range(3))  # more than a piece, no multiple of it
    gate[0, 0], gate[1, 0], gate[2, 0] = 100.0, -100.0, math.nan
    wide, wide_up = (each.float().requires_grad_() for each in (gate, up))
    plain = F.silu(wide) * wide_up
    expected = grads(plain, wide, wide_up, upstream=down)
    before = [each.clone() for each in (gate, up)]
    inner, grad_gate, grad_up = made().gated_back_(gate, up, down)
    pairs = ((made().gated_(gate, up, torch.empty_like(gate)), plain), (inner, plain))
    for found, wanted in (*pairs, *zip((grad_gate, grad_up), expected, strict=True)):
        torch.testing.assert_close(found, wanted.detach().to(dtype), **CLOSE[dtype], equal_nan=True)
    for one, other in zip((gate, up), before, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), "an input was written over"


@pytest.mark.parametrize("by", [1.0, 2.0])
@pytest.mark.parametrize("entropy", [False, True])
def test_log_probs_by_tiles(dtype, by, entropy):
    hidden, head = torch.randn(23, 32).to(dtype).requires_grad_(), torch.randn(400, 32).requires_grad_()
    target, up, more = torch.randint(0, 400, (23,)), torch.randn(23), torch.randn(23)
    up[3], more[3] = 0.0, 0.0  # a row whose backward is not computed
    results = []
    for maths in (None, made()):
        hidden.grad = head.grad = None
        stats = token_logprobs(hidden, head, target, 1 / by, entropy, tile_bytes=23 * 4 * 128, maths=maths)
        loss = (stats.logp_N * up).sum() + (0 if stats.entropy_N is None else (stats.entropy_N * more).sum())
        loss.backward()
        results.append((stats.logp_N.detach(), loss.detach(), hidden.grad.float(), head.grad.float()))
    for plain, found in zip(*results, strict=True):
        assert (found - plain).norm() <= (2e-6 if dtype == FP32 else 1e-2) * plain.norm()


def test_a_gradient_at_a_target_that_is_nearly_sure_is_rounded_once():
    """1 - p = 3 e^-9 = 3.7e-4; p rounded to bf16 first would make it 0."""
    logits = torch.zeros(1, 16)
    logits[0, 4], logits[0, 5:] = 9.0, -math.inf
    logits[0, 3] = -math.inf
    tile, place = logits.bfloat16(), torch.tensor([4])
    made().slope_(tile, 1.0, place, RowSlopes(logits.logsumexp(-1), torch.ones(1), None, None))
    assert tile[0, 4].item() == pytest.approx(3 * math.exp(-9) / (1 + 3 * math.exp(-9)), rel=2**-8)
    assert tile[0, 0].item() == pytest.approx(-math.exp(-9), rel=2**-8)
    assert tile[0, 5].item() == 0


def test_the_weighted_sum(dtype):
    hidden, head = torch.randn(23, 32).to(dtype).requires_grad_(), torch.randn(400, 32).requires_grad_()
    target, weight = torch.randint(0, 400, (23,)), torch.rand(23)
    results = []
    for finish in ({}, {"finish": made().softmax_less_}):
        hidden.grad = head.grad = None
        found = weighted_nll(hidden, head, target, weight, chunk_bytes=8 * 400 * 4, **finish)
        found.loss.backward()
        results.append((found.loss.detach(), found.logp_N, hidden.grad.float(), head.grad.float()))
        with torch.no_grad():
            again = weighted_nll(hidden, head, target, weight, chunk_bytes=8 * 400 * 4, **finish).logp_N
        torch.testing.assert_close(again, found.logp_N)
    for plain, found in zip(*results, strict=True):
        assert (found - plain).norm() <= (2e-6 if dtype == FP32 else 1e-2) * plain.norm()


@pytest.mark.parametrize("target", [-100, 32])
def test_a_target_outside_of_the_vocabulary_is_refused_before_anything_is_written(target):
    hidden, head = torch.randn(2, 16), torch.randn(32, 16)
    with pytest.raises(IndexError, match=f"target {target} is none of a vocabulary of 32"):
        weighted_nll(hidden, head, torch.tensor([3, target]), torch.ones(2), finish=made().softmax_less_)


def test_what_the_functions_do_not_take_goes_to_operators(monkeypatch):
    monkeypatch.setattr(layers, "layer_kernels", lambda: pytest.fail("was asked"))
    layers.rms_norm(torch.randn(3, 10), torch.ones(10), 1e-5, FP32)
    layers.rms_norm(torch.randn(3, 16).double(), torch.ones(16).double(), 1e-5, torch.float64)
    layers.gated(torch.randn(0, 16), torch.randn(0, 16))
    layers.rotary(torch.randn(1, 2, 3, 8), torch.randn(1, 3, 8), torch.randn(1, 3, 8))


@pytest.mark.parametrize("off", [0.1, math.nan])
def test_functions_that_are_off_are_refused_and_said(monkeypatch, caplog, off):
    right = LayerKernels.gated_
    monkeypatch.setattr(LayerKernels, "gated_", lambda *args: right(*args).add_(off))
    layer_kernels.cache_clear()
    try:
        assert layer_kernels() is None
    finally:
        layer_kernels.cache_clear()
    assert "compiled layers are off by" in caplog.text


def test_the_default_dtype_and_device_say_nothing_of_what_is_written():
    """Floats written to room for as many bf16 numbers would be others' memory; transformers sets it while it loads."""
    pack, inputs = spans(30), [torch.randn(1, 2, 30, 16) for _ in range(3)]
    x, logits, target = torch.randn(3, 16), torch.randn(3, 16), torch.arange(3)
    results = []
    for default, device in ((FP32, "cpu"), (BF16, "cpu"), (FP32, "meta")):
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            with torch.device(device):
                out, inverse = made().norm(x, x[0], 1e-5, FP32)
                grad_x, grad_weight = made().norm_back(x, x, x[0], inverse)
                logp = made().softmax_less_(logits.clone(), target)
                attended, lse = segment_kernels(16).forward(_Cut(pack), *inputs, 0.25)
                back = segment_kernels(16).backward(_Cut(pack), *inputs, lse, attended.transpose(1, 2), 0.25)
        finally:
            torch.set_default_dtype(before)
        results.append([out, inverse, grad_x, grad_weight, logp, attended, lse, *back])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
    layer_kernels.cache_clear()
    try:
        torch.set_default_dtype(BF16)
        assert layer_kernels() is not None, "the trial, too"
    finally:
        torch.set_default_dtype(FP32)


def test_a_gate_in_another_dtype_than_what_it_gates_is_left_to_operators():
    gate, up = torch.randn(3, 32).bfloat16().requires_grad_(), torch.randn(3, 32).requires_grad_()
    found, expected = layers.gated(gate, up), F.silu(gate) * up
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(each.sum(), (gate, up)) for each in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(1, 7, 32), (1, 1, 64), (1, 6, 64)])
def test_turning_by_factors_that_are_too_few_is_left_to_operators(shape):
    x, cos, sin = torch.randn(1, 2, 7, 64), torch.rand(shape), torch.rand(shape)
    if shape[1] == 1:  # as broadcasting has it
        torch.testing.assert_close(
            layers.rotary(x, cos, sin), layers.rotary(x, *(f.repeat(1, 7, 1) for f in (cos, sin)))
        )
        return
    with pytest.raises(RuntimeError, match="must match"):
        layers.rotary(x, cos, sin)


# Attention ------------------------------------------------------------------------------------------------------------


def spans(*lengths: int, parents: tuple[int, ...] = ()) -> list[Span]:
    edges = pairwise((0, *accumulate(lengths)))
    return [Span(start, end, parents[i] if parents else -1) for i, (start, end) in enumerate(edges)]


PACKS = {
    "one": spans(2),
    "documents": spans(161, 90, 1, 300, 48, 49, 64, 15),
    "a tree": spans(200, 70, 31, 5, 64, 130, 1, 20, parents=(-1, 0, 0, 2, 2, -1, 5, 5)),
    "a parent behind another document": spans(20, 70, 30, 16, parents=(-1, -1, 0, 2)),
}


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("shape", [(9, 3, 64), (4, 4, 16), (2, 1, 96), (8, 2, 128)], ids=str)
def test_attention_is_pytorchs_forward_and_backward(dtype, shape, pack):
    heads, key_heads, width = shape
    tokens = PACKS[pack][-1].end
    inputs = [torch.randn(1, tokens, n, width).to(dtype).transpose(1, 2) for n in (heads, key_heads, key_heads)]
    found = _numbers(CompiledSegments, PACKS[pack], inputs)
    expected = _numbers(SdpaTiles, PACKS[pack], [x.float() for x in inputs])
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one.float() - other).abs().max() <= (2e-6 if dtype == FP32 else 1e-2) * other.abs().max().clamp(min=0.1)


def test_any_memory_order_will_do():
    pack, shape = PACKS["a tree"], (1, 4, PACKS["a tree"][-1].end, 32)
    inputs = [torch.randn(shape) for _ in range(3)]
    orders = [inputs, [x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs]]
    first, second = (_numbers(CompiledSegments, pack, order) for order in orders)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_document_takes_the_segments_between_a_child_and_its_parent_along():
    cut = _Cut(PACKS["a parent behind another document"])
    assert cut.documents.tolist() == [[0, 4]]
    cut = _Cut(PACKS["documents"])
    assert cut.documents[0].tolist() == [3, 4], "the costliest first"
    assert sorted(cut.documents[:, 0].tolist()) == list(range(8))
    assert (cut.columns, cut.tokens) == (320, 300)


def test_scores_far_apart_do_not_overflow_and_a_number_that_is_none_stays_in_its_document():
    pack = spans(3, 50)
    q, k, v = torch.ones(1, 2, 53, 16), torch.zeros(1, 2, 53, 16), torch.randn(1, 2, 53, 16)
    k[:, :, 1], k[:, :, 5] = 4000.0, math.nan  # scores of 64,000 / 4 beside ones of 0
    out = CompiledSegments(pack)(q, k, v, 0.25)
    assert torch.equal(out[0, 2], v[0, :, 1])
    assert out[0, :5].isfinite().all()
    assert out[0, 5:].isnan().all()


def test_how_many_threads_work_changes_nothing(dtype):
    pack, before, results = PACKS["a tree"], torch.get_num_threads(), []
    inputs = [torch.randn(1, n, pack[-1].end, 64).to(dtype) for n in (9, 3, 3)]
    x, weight = torch.randn(99, 64).to(dtype), torch.rand(64)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, inverse = made().norm(x, weight, 1e-5, dtype)
            back = made().norm_back(x, out, weight, inverse)
            results.append([*_numbers(CompiledSegments, pack, inputs), out, *back])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("width", "value_width"), [(48, 32), (32, 48), (24, 24)])
def test_values_of_another_width_than_keys_go_to_matrix_products(width, value_width):
    """DeepSeek's heads: the trial is told one width, and what is read by it was others' memory."""
    inputs = [torch.randn(1, 2, 33, width) for _ in range(2)] + [torch.randn(1, 2, 33, value_width)]
    pack = spans(20, 13, parents=(-1, 0))
    out, expected = (backend(pack)(*inputs, 0.2) for backend in (CompiledSegments, SdpaTiles))
    torch.testing.assert_close(out, expected)


def test_heads_of_another_width_have_none_and_doubles_go_to_matrix_products():
    with pytest.raises(RuntimeError, match="heads are 8 wide, which is no multiple of 16"):
        segment_kernels(8)
    inputs = [torch.randn(1, 2, 4, 8).double() for _ in range(3)]
    found, expected = (_numbers(backend, spans(1, 3), inputs) for backend in (CompiledSegments, SdpaTiles))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
