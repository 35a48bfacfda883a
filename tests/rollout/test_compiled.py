"""The compiled functions of decoding against PyTorch's operators, each alone."""

import math

import pytest
import torch
from torch import Tensor

from tulu_lightning.rollout import compiled
from tulu_lightning.rollout.compiled import Kernels, Shared, kernels
from tulu_lightning.rollout.sampling import pick

SHAPES = [(1, 1, 16), (3, 3, 64), (9, 3, 64), (8, 2, 32), (10, 2, 48), (7, 1, 16), (8, 1, 128), (32, 2, 16)]
"""Query heads, key heads, width."""
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 1e-2, "atol": 2e-2}}
pytestmark = pytest.mark.skipif(kernels("cpu", torch.float32, 9, 3, 64) is None, reason="no C++ compiler")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    torch.manual_seed(0)
    return request.param


def made(dtype: torch.dtype, shape: tuple[int, int, int] = (9, 3, 64)) -> Kernels:
    found = kernels("cpu", dtype, *shape)
    assert found is not None
    return found


def seen(q_Hd: Tensor, k_KSd: Tensor, v_KSd: Tensor) -> Tensor:
    """Attention of one token in fp32, head by head."""
    group, outs = len(q_Hd) // len(k_KSd), []
    for head, q in enumerate(q_Hd.float()):
        scores = k_KSd[head // group].float() @ q
        outs.append(scores.softmax(0) @ v_KSd[head // group].float())
    return torch.stack(outs)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_over_slots_of_any_filling(dtype, shape):
    heads, key_heads, width = shape
    filled = torch.tensor([0, 1, 3, 4, 15, 16, 63, 64, 65, 127, 128, 199])
    kv = torch.randn(2, 14, key_heads, 200, width).to(dtype)  # two slots are nobody's
    qkv = (torch.randn(len(filled), heads + 2 * key_heads, width) / 2).to(dtype)
    before = kv.clone()
    out = made(dtype, shape).attend(qkv, kv, filled)
    assert out.shape == (len(filled), heads * width)
    for row, place in enumerate(filled.tolist()):
        k_new, v_new = qkv[row, heads:].split(key_heads)
        assert torch.equal(kv[0, row, :, place], k_new)
        assert torch.equal(kv[1, row, :, place], v_new)
        expected = seen(qkv[row, :heads], *kv[:, row, :, : place + 1])
        torch.testing.assert_close(out[row].view(heads, width).float(), expected, **CLOSE[dtype])
        kv[:, row, :, place] = before[:, row, :, place]
    assert torch.equal(kv, before)  # nothing else was written


@pytest.mark.parametrize("group_B", [[1, 0, 1, 0], [0, 0, 0, 0], [0, 2, 2, 1], [2, 2, 2, 2]])
def test_attention_goes_on_from_what_groups_of_rows_share(dtype, group_B):
    heads, key_heads, width = 9, 3, 64
    shared_kv, sizes = torch.randn(2, 4, key_heads, 150, width).to(dtype), [149, 1, 70][: max(group_B) + 1]
    kv, filled = torch.randn(2, 4, key_heads, 90, width).to(dtype), torch.tensor([3, 0, 89, 64])
    qkv = (torch.randn(4, heads + 2 * key_heads, width) / 2).to(dtype)
    found = made(dtype).attend(qkv, kv, filled, Shared.of(group_B, sizes), shared_kv)
    for row, slot in enumerate(group_B):
        both = torch.cat([shared_kv[:, slot, :, : sizes[slot]], kv[:, row, :, : int(filled[row]) + 1]], 2)
        expected = seen(qkv[row, :heads], *both)
        torch.testing.assert_close(found[row].view(heads, width).float(), expected, **CLOSE[dtype])


def test_members_lie_slot_by_slot():
    shared = Shared.of([1, 0, 3, 1], [5, 6, 7, 8])
    assert shared.size_P.tolist() == [5, 6, 7, 8]
    assert shared.member_B.tolist() == [1, 0, 3, 2]
    assert shared.first_P.tolist() == [0, 1, 3, 3, 4]


def test_scores_far_apart_do_not_overflow_and_a_number_that_is_none_stays_one():
    kv = torch.zeros(2, 1, 3, 4, 64)
    kv[0, 0, :, 0], kv[1, 0, :, 0] = 1000.0, 7.0  # a score of 64,000 beside ones of 0
    qkv = torch.cat([torch.ones(1, 9, 64), torch.zeros(1, 6, 64)], 1)
    assert made(torch.float32).attend(qkv, kv, torch.tensor([2])).unique().tolist() == [7.0]
    kv[0, 0, 1, 1] = math.nan  # one place of the second key head
    out = made(torch.float32).attend(qkv, kv, torch.tensor([2])).view(3, 3, 64)
    assert out.isnan().all(-1).all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("width", [1, 16, 576, 577])
def test_norms_equal_the_models_own(dtype, width):
    x, weight = torch.randn(5, width).to(dtype), torch.randn(width).to(dtype)
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    torch.testing.assert_close(made(dtype).norm(x, weight, 1e-5), expected, **CLOSE[dtype])


@pytest.mark.parametrize("width", [1, 16, 48, 50, 1536])
def test_gates(dtype, width):
    both = torch.randn(5, 2 * width).to(dtype)
    both[0, 0], both[1, 0], both[2, 0] = 100.0, -100.0, math.nan
    gate, up = both.float().chunk(2, -1)
    found = made(dtype).gated(both).float()
    torch.testing.assert_close(found, gate * gate.sigmoid() * up, **CLOSE[dtype], equal_nan=True)
    assert found[2, 0].isnan()


def test_turning_queries_and_keys_leaves_values_alone(dtype):
    heads, key_heads, width = shape = (4, 2, 32)
    angle = torch.rand(9, width // 2) * 6
    cos, sin = angle.cos().repeat(1, 2).to(dtype), torch.cat([-angle.sin(), angle.sin()], 1).to(dtype)
    qkv, positions = torch.randn(3, heads + 2 * key_heads, width).to(dtype), torch.tensor([8, 0, 5])
    x1, x2 = qkv[:, : heads + key_heads].float().chunk(2, -1)
    c, s = (x[positions, None, : width // 2].float() for x in (cos, -sin))
    expected = torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)
    expected[:, :heads] *= 0.3
    values = qkv[:, heads + key_heads :].clone()
    made(dtype, shape).turn_(qkv, cos, sin, positions, 0.3)
    torch.testing.assert_close(qkv[:, : heads + key_heads].float(), expected, **CLOSE[dtype])
    assert torch.equal(qkv[:, heads + key_heads :], values)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("vocabulary", [2, 37, 256, 257, 5000])
def test_tokens_are_those_of_pick(dtype, vocabulary, temperature):
    logits, uniform = (torch.randn(400, vocabulary) * 3).to(dtype), torch.rand(400)
    expected, found = pick(logits, temperature, uniform), made(dtype).draw(logits, temperature, uniform)
    same = expected[0] == found[0]
    assert same.float().mean() > 0.99  # a draw within rounding of a border may differ
    assert (expected[0] - found[0]).abs().max() <= (0 if temperature == 0 else vocabulary)
    torch.testing.assert_close(found[1][same], expected[1][same], rtol=1e-5, atol=1e-5)


def test_a_draw_gives_tokens_of_some_probability_alone_at_both_ends():
    logits = torch.full((4, 600), -math.inf)
    logits[:, [3, 300, 599]] = torch.tensor([0.0, math.log(2), 0.0])  # a quarter, a half, a quarter
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 1 - 2**-24])
    token, logp = made(torch.float32).draw(logits, 1.0, uniform)
    assert token.tolist() == [3, 3, 300, 599]
    torch.testing.assert_close(logp.exp(), torch.tensor([0.25, 0.25, 0.5, 0.25]))


def test_a_logit_that_is_no_number_gives_a_log_prob_that_is_none():
    logits = torch.zeros(2, 300)
    logits[1, 200] = math.nan
    for temperature in (1.0, 0.0):
        assert made(torch.float32).draw(logits, temperature, torch.rand(2))[1].isnan().tolist() == [False, True]


def test_how_many_threads_work_changes_nothing(dtype):
    qkv, kv = torch.randn(8, 15, 64).to(dtype), torch.randn(2, 8, 3, 90, 64).to(dtype)
    logits, filled, uniform = torch.randn(8, 999).to(dtype), torch.arange(8) * 12, torch.rand(8)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([made(dtype).attend(qkv, kv.clone(), filled), *made(dtype).draw(logits, 1.0, uniform)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize(("name", "off"), [("norm", 0.1), ("norm", math.inf), ("attend", math.nan)])
def test_functions_that_are_off_are_refused_and_said(monkeypatch, caplog, name, off):
    right = getattr(Kernels, name)
    monkeypatch.setattr(Kernels, name, lambda *args: right(*args) + off)
    kernels.cache_clear()
    try:
        assert kernels("cpu", torch.float32, 9, 3, 64) is None
    finally:
        kernels.cache_clear()
    assert f"compiled decoding is off by {'0.1' if off == 0.1 else 'inf'}" in caplog.text


@pytest.mark.parametrize("wrong", ["what rows share", "tokens", "log-probs"])
def test_the_trial_sees_what_rows_share_and_what_is_drawn(monkeypatch, wrong):
    attend, draw = Kernels.attend, Kernels.draw

    def off(kernel: Kernels, *args: Tensor) -> tuple[Tensor, Tensor]:
        token_R, logp_R = draw(kernel, *args)
        return (token_R, logp_R + 0.1) if wrong == "log-probs" else (token_R.roll(1), logp_R.roll(1))

    if wrong == "what rows share":
        monkeypatch.setattr(Kernels, "attend", lambda *args: attend(*args[:4]))
    else:
        monkeypatch.setattr(Kernels, "draw", off)
    kernels.cache_clear()
    try:
        assert kernels("cpu", torch.float32, 9, 3, 64) is None
    finally:
        kernels.cache_clear()


@pytest.mark.parametrize(
    ("device", "dtype", "shape"),
    [("cuda", torch.float32, (9, 3, 64)), ("cpu", torch.float16, (9, 3, 64)), ("cpu", torch.float32, (4, 2, 8))],
)
def test_other_devices_dtypes_and_widths_have_none(device, dtype, shape, monkeypatch):
    monkeypatch.setattr(compiled, "load_compiled", lambda *_: pytest.fail("was compiled"))
    assert kernels(device, dtype, *shape) is None
