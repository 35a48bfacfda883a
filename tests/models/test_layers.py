import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tulu_lightning.core.matmul import low_linear
from tulu_lightning.models.layers import embed, gated_mlp, rms_norm, rotary


def leaves(*shapes):
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def compare(ours, theirs, inputs, tolerance=1e-5):
    """Values and every gradient, for one upstream gradient."""
    upstream = torch.randn(ours.shape).to(ours.dtype)
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance)
    found = torch.autograd.grad(ours, inputs, upstream)
    expected = torch.autograd.grad(theirs, inputs, upstream.to(theirs.dtype))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def test_the_norm_is_torchs():
    x, weight = leaves((2, 7, 16), (16,))
    compare(rms_norm(x, weight, 1e-5, torch.float32), F.rms_norm(x, (16,), weight, 1e-5), [x, weight])


def test_the_norm_of_a_hand_sized_row():
    # mean square (9 + 16) / 2 = 12.5, so x / 3.5355 = (0.8485, 1.1314), times the weights (1, 2)
    y = rms_norm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]), 0.0, torch.float32)
    assert y.tolist() == pytest.approx([0.848528, 2.262742], abs=1e-5)


def mlp(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gated_mlp_is_the_plain_one(recompute):
    x, *weights = leaves((2, 5, 8), (24, 8), (24, 8), (8, 24))
    compare(gated_mlp(x, tuple(weights), tuple(weights), recompute), mlp(x, *weights), [x, *weights])


def kept_bytes(make):
    """What autograd keeps of a computation, its parameters left out."""
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = 0 if tensor.is_leaf and tensor.requires_grad else tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = make()
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(("recompute", "columns"), [(False, 8 + 2 * 24), (True, 8)])
def test_a_gated_mlp_keeps_its_input_and_two_projections_or_its_input_alone(recompute, columns):
    x, *weights = leaves((5, 8), (24, 8), (24, 8), (8, 24))
    low = tuple(weight.detach().bfloat16() for weight in weights)
    made = kept_bytes(lambda: gated_mlp((x * 1).bfloat16(), tuple(weights), low, recompute))
    assert made == 2 * 5 * columns, "bf16, and no copy of a weight"


def test_a_linear_layer_keeps_its_input_and_no_copy_of_its_weight():
    x, weight = leaves((5, 8), (12, 8))
    assert kept_bytes(lambda: low_linear((x * 1).bfloat16(), weight, weight.detach().bfloat16())) == 2 * 5 * 8


def test_frozen_weights_of_the_mlp_get_no_gradient_and_its_input_does():
    x, *weights = leaves((3, 8), (24, 8), (24, 8), (8, 24))
    frozen = tuple(w.detach() for w in weights)
    compare(gated_mlp(x, frozen, frozen), mlp(x, *frozen), [x])


def test_a_low_copy_computes_in_its_dtype_and_the_gradient_is_the_weights():
    x, weight = torch.randn(2, 5, 8).bfloat16().requires_grad_(), torch.randn(12, 8).requires_grad_()
    out = low_linear(x, weight, weight.detach().bfloat16())
    assert out.dtype == torch.bfloat16
    upstream = torch.randn(out.shape).bfloat16()
    grad_x, grad_weight = torch.autograd.grad(out, [x, weight], upstream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = F.linear(x, weight)
    expected_x, expected_weight = torch.autograd.grad(plain, [x, weight], upstream)
    assert torch.equal(out, plain)
    assert (grad_x.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(grad_x, expected_x)
    torch.testing.assert_close(grad_weight, expected_weight)


@pytest.mark.parametrize("padding", [None, 3])
def test_an_embedding_is_torchs(padding):
    (table,) = leaves((10, 4))
    ids = torch.tensor([[3, 1, 3], [9, 0, 1]])
    compare(embed(ids, table, padding), F.embedding(ids, table, padding), [table])


def turned(x, cos, sin):
    return apply_rotary_pos_emb(x, x, cos, sin)[0]


def angles(tokens, width):
    """Of any numbers: the two halves need not turn alike."""
    return torch.randn(1, tokens, width), torch.randn(1, tokens, width)


def test_rotary_is_transformers_own_whatever_the_memory_order():
    cos, sin = angles(5, 8)
    for x in (torch.randn(1, 3, 5, 8), torch.randn(1, 5, 3, 8).transpose(1, 2)):
        x.requires_grad_()
        mine = rotary(x, cos, sin)
        assert mine.stride() == x.stride()
        compare(mine, turned(x, cos, sin), [x])


def test_rotary_turns_a_hand_sized_head():
    # Halves (1, 2) and (3, 4) turned by a quarter and by none: (-3, 2) and (1, 4).
    cos, sin = torch.tensor([[[0.0, 1.0, 0.0, 1.0]]]), torch.tensor([[[1.0, 0.0, 1.0, 0.0]]])
    assert rotary(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), cos, sin).flatten().tolist() == [-3, 2, 1, 4]


def test_rotary_in_bf16_rounds_once():
    cos, sin = angles(5, 8)
    x = torch.randn(1, 2, 5, 8).bfloat16().requires_grad_()
    mine = rotary(x, cos, sin)
    assert torch.equal(mine, turned(x.detach().float(), cos, sin).bfloat16())
    (grad,) = torch.autograd.grad(mine, x, torch.ones_like(mine))
    assert grad.dtype == torch.bfloat16
    wide = x.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(turned(wide, cos, sin), wide, torch.ones(wide.shape))
    torch.testing.assert_close(grad, expected.bfloat16(), rtol=2**-7, atol=2**-7)
