import pytest
import torch
import torch.nn.functional as F

from tulu_lightning.core import matmul


@pytest.fixture(params=["default", "onednn"])
def library(request, monkeypatch):
    """Both libraries, whatever this machine would choose."""
    if request.param == "onednn" and not matmul._onednn_works():
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(matmul, "fp32_library", lambda: request.param)
    return request.param


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 64, 1), (130, 48, 97)])
def test_a_product_is_what_fp64_gives_also_of_transposed_views(library, shape):
    m, k, n = shape
    a, b = torch.randn(m, k), torch.randn(n, k)
    exact = (a.double() @ b.double().T).float()
    close(matmul.product(a, b), exact)
    close(matmul.product(a.T.contiguous().T, b.T.contiguous().T), exact)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_has_torchs_values_and_gradients(library, bias):
    x, w = torch.randn(2, 9, 16), torch.randn(24, 16)
    b, upstream = (torch.randn(24) if bias else None), torch.randn(2, 9, 24)
    results = []
    for function in (matmul.linear, F.linear):
        leaves = [t.clone().requires_grad_() for t in (x, w, b) if t is not None]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    for one, other in zip(*results, strict=True):
        close(one, other)


def test_the_gradient_of_a_sum_which_is_one_number_expanded_comes_through(library):
    x, w = torch.randn(6, 4), torch.randn(3, 4, requires_grad=True)
    matmul.linear(x, w).sum().backward()
    close(w.grad, x.sum(0).expand(3, 4))


def test_a_frozen_weight_gets_no_gradient_and_its_input_does(library):
    x, w = torch.randn(6, 4, requires_grad=True), torch.randn(3, 4)
    matmul.linear(x, w).sum().backward()
    close(x.grad, w.sum(0).expand(6, 4))


@pytest.mark.parametrize("x", [torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(0, 8)], ids=["bf16", "no rows"])
def test_what_onednn_is_not_for_goes_the_usual_way(library, x):
    w = torch.randn(3, 8).to(x.dtype)
    assert torch.equal(matmul.linear(x, w), F.linear(x, w))
    assert matmul.product(x, w).dtype == x.dtype


def test_autocast_decides_the_dtype_as_usual(library):
    x, w = torch.randn(4, 8), torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert matmul.linear(x, w).dtype == torch.bfloat16


def test_the_choice_is_the_processors_and_not_a_timings(monkeypatch):
    for vendor, expected in (("AuthenticAMD", {"onednn", "default"}), ("GenuineIntel", {"default"}), ("", {"default"})):
        monkeypatch.setattr(matmul, "_vendor", lambda vendor=vendor: vendor)
        matmul.fp32_library.cache_clear()
        assert matmul.fp32_library() in expected
        assert (matmul.fp32_library() == "onednn") == (vendor == "AuthenticAMD" and matmul._onednn_works())
    matmul.fp32_library.cache_clear()
