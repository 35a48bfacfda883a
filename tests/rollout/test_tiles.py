"""Products by tiles, on processors that have them (AMX); elsewhere only that nothing is claimed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tulu_lightning.assets.compiled import Compiled
from tulu_lightning.rollout import packed_weights, tiles
from tulu_lightning.rollout.packed_weights import fuse
from tulu_lightning.rollout.tiles import MOST_ROWS, Tiled, tiled

HERE = pytest.mark.skipif(tiled() is None, reason="this processor has no tiles (AMX), or there is no compiler")


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@HERE
@pytest.mark.parametrize(("outputs", "inputs"), [(32, 32), (96, 64), (960, 576), (576, 1536)])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 33, 48, 49, 64, 200])
def test_a_product_is_summed_in_fp32_and_rounded_once(outputs, inputs, rows):
    weight, x, bias, other = (
        numbers(*shape, seed=i)
        for i, shape in enumerate([(outputs, inputs), (rows, inputs), (outputs,), (rows, outputs)])
    )
    found = tiled()
    packed = found.pack(weight)
    assert torch.equal(found.unpack(packed), weight)
    assert not torch.equal(packed, weight)
    plain = x.float() @ weight.float().T
    for with_bias, with_other in ((None, None), (bias, None), (bias, other), (None, other)):
        right = plain + sum(each.float() for each in (with_bias, with_other) if each is not None)
        made = found.product(x, packed, with_bias, with_other)
        # Half a unit of bf16 in the last place, and what another order of fp32 sums makes.
        assert ((made.float() - right).abs() <= 2**-8 * right.abs() + 1e-3).all()


@HERE
def test_nothing_is_written_past_the_output_or_left_out():
    found, weight, x = tiled(), numbers(64, 32), numbers(5, 32, seed=1)
    room = torch.full((7, 64), 7.0, dtype=torch.bfloat16)
    packed = found.pack(weight)
    made = room[1:6]
    found._product(x.data_ptr(), packed.data_ptr(), None, None, made.data_ptr(), 5, 64, 32, 2)
    assert (room[0] == 7).all()
    assert (room[6] == 7).all()
    assert torch.equal(made, found.product(x, packed, None))


@HERE
def test_threads_change_no_sum():
    found, weight, x = tiled(), numbers(960, 576), numbers(32, 576, seed=1)
    packed, threads, made = found.pack(weight), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            made.append(found.product(x, packed, None))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@HERE
def test_a_library_with_tiles_of_its_own_is_not_disturbed():
    """oneDNN sets its tiles once and remembers that it did."""
    found, weight, x = tiled(), numbers(256, 128), numbers(40, 128, seed=1)
    packed, right = found.pack(weight), F.linear(x, weight)
    for _ in range(20):
        found.product(x, packed, None)
        assert torch.equal(F.linear(x, weight), right)


@HERE
def test_infinities_and_nan_arrive():
    weight, x = numbers(32, 32), numbers(16, 32, seed=1)
    x[3, 5], x[7, 2] = torch.inf, torch.nan
    found = tiled()
    made, right = found.product(x, found.pack(weight), None), F.linear(x, weight)
    assert torch.equal(made.isnan(), right.isnan())
    assert torch.equal(made.isinf(), right.isinf())


@pytest.mark.parametrize(
    "weight",
    [
        numbers(48, 32),  # outputs come by 32
        numbers(64, 40),  # so do inputs
        numbers(64, 64).float(),
        numbers(64, 64).T[:, :32],
    ],
)
def test_other_matrices_are_left_to_others(weight):
    assert not Tiled.fits(weight)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    assert fuse([("one", layer)]).tiles is None or Tiled.fits(layer.weight)


@HERE
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [3, MOST_ROWS, MOST_ROWS + 1])
def test_matrices_of_the_engine_are_read_by_tiles_and_read_back(rows, bias):
    layers = [nn.Linear(64, n, bias=bias, dtype=torch.bfloat16).requires_grad_(False) for n in (64, 32)]
    matrix, x = fuse([("a", layers[0]), ("b", layers[1])]), numbers(rows, 64)
    assert matrix.tiles is not None
    right = torch.cat([layer(x).float() for layer in layers], 1)
    assert torch.allclose(matrix(x).float(), right, atol=0.02, rtol=0.02)
    assert torch.allclose(
        matrix.plus(x, x.repeat(1, 2)[:, :96]).float(), right + x.repeat(1, 2)[:, :96], atol=0.05, rtol=0.02
    )
    with torch.no_grad():
        layers[1].weight.add_(1)
    before = dict(matrix.used())
    assert torch.equal(before["a.weight"], layers[0].weight)
    assert not torch.equal(before["b.weight"], layers[1].weight)  # not packed anew: read back as it is used
    matrix.pack()
    assert torch.equal(dict(matrix.used())["b.weight"], layers[1].weight)


@HERE
def test_wrong_numbers_are_not_used(monkeypatch):
    tiled.cache_clear()
    product = Tiled.product
    monkeypatch.setattr(Tiled, "product", lambda self, *args: product(self, *args) * 1.1)
    try:
        assert tiled() is None
    finally:
        monkeypatch.undo()
        tiled.cache_clear()
    assert tiled() is not None


def test_without_a_compiler_there_are_none(monkeypatch):
    monkeypatch.setattr(tiles, "load_compiled", lambda source: Compiled(None, "none"))
    tiled.cache_clear()
    try:
        assert tiled() is None
        matrix = packed_weights.fuse([("a", nn.Linear(64, 64, bias=False, dtype=torch.bfloat16))])
        assert matrix.tiles is None
    finally:
        monkeypatch.undo()
        tiled.cache_clear()
