"""Every attention backend computes what one dense mask says, and compiles as seldom as it may."""

import random

import pytest
import torch
import torch.nn.functional as F

from tulu_lightning.core.visibility import sees, visibility
from tulu_lightning.models import fused
from tulu_lightning.models.attention import layout
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.models.fused import Flex, Varlen, blocks
from tulu_lightning.models.matmul import MatmulTiles
from tulu_lightning.models.tiles import SdpaTiles, tiles
from tulu_lightning.types import Span

BF16 = torch.bfloat16
PLAIN = [Span(0, 70, -1), Span(70, 71, -1), Span(71, 400, -1)]


def trees(seed):
    """Documents of 1 to 5 segments, each 1 to 300 tokens; any earlier segment of the document may be the parent."""
    rng, spans, start = random.Random(seed), [], 0
    for _ in range(5):
        first = len(spans)
        for _ in range(rng.randint(1, 5)):
            count = rng.choice([1, 3, 20, 60, 97, 128, 300])
            parent = rng.randint(first, len(spans) - 1) if len(spans) > first else -1
            spans.append(Span(start, start + count, parent))
            start += count
    return spans


def dense_mask(spans):
    every = torch.arange(spans[-1].end)
    return sees(visibility(spans), every[:, None], every[None])


def numbers(attend, tokens, heads, dtype=torch.float64):
    """Output and gradients for random queries of 4 heads, and keys and values of `heads`."""
    generator = torch.Generator().manual_seed(0)
    # Projections give [T, heads, width]; the layer turns them, so the memory order is that of training.
    leaves = [torch.randn(1, tokens, h, 8, generator=generator, dtype=torch.float64) for h in (4, heads, heads)]
    leaves = [x.to(dtype).requires_grad_() for x in leaves]
    out = attend(*(x.transpose(1, 2) for x in leaves), 0.3)
    up = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, up)]


def by_dense_mask(spans):
    def attend(query, key, value, scale):
        key, value = (x.repeat_interleave(4 // x.shape[1], 1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, dense_mask(spans), scale=scale).transpose(1, 2)

    return attend


# Exactness ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("backend", [MatmulTiles, SdpaTiles])
def test_tiles_equal_one_dense_mask_forward_and_backward(backend, seed, heads):
    spans = trees(seed)
    expected = numbers(by_dense_mask(spans), spans[-1].end, heads)
    for found, exact in zip(numbers(backend(spans), spans[-1].end, heads), expected, strict=True):
        torch.testing.assert_close(found, exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", [MatmulTiles, SdpaTiles])
def test_bf16_rounds_less_than_pytorchs_own_attention_does(backend):
    spans = trees(1)
    exact = numbers(by_dense_mask(spans), spans[-1].end, 2)
    theirs = numbers(by_dense_mask(spans), spans[-1].end, 2, BF16)
    for found, other, right in zip(numbers(backend(spans), spans[-1].end, 2, BF16), theirs, exact, strict=True):
        assert found.dtype == BF16
        # A factor of 1.5 leaves room for chance; scores rounded to bf16 would be 3 times as far off.
        assert (found - right).pow(2).mean() <= 1.5**2 * (other - right).pow(2).mean()


def test_no_second_derivative_is_made_up():
    x = torch.randn(1, 2, 5, 4, requires_grad=True)
    (first,) = torch.autograd.grad(MatmulTiles([Span(0, 5, -1)])(x, x, x, 0.5).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("seed", range(3))
def test_flex_attention_equals_one_dense_mask(seed):
    spans = trees(seed)
    q, k, v = (torch.randn(1, h, spans[-1].end, 8, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
    expected = by_dense_mask(spans)(q, k, v, 0.3)
    torch.testing.assert_close(Flex(spans)(q, k, v, 0.3), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_the_blocks_of_a_flex_mask_are_those_of_the_dense_one(seed):
    spans = [*trees(seed), *(Span(s.start + trees(seed)[-1].end, s.end + trees(seed)[-1].end, -1) for s in PLAIN)]
    some, full = blocks(spans)
    size = fused.BLOCK * some.shape[0]
    dense = torch.zeros(size, size, dtype=torch.bool)
    dense[: spans[-1].end, : spans[-1].end] = dense_mask(spans)
    tiled = dense.unflatten(1, (-1, fused.BLOCK)).unflatten(0, (-1, fused.BLOCK)).transpose(1, 2)
    assert torch.equal(some, tiled.any(-1).any(-1))
    assert not (full & ~tiled.all(-1).all(-1)).any()  # a block called full is; one that happens to be may not be called
    assert full.any()


def test_varlen_is_told_the_ends_of_the_documents():
    attend = Varlen(PLAIN)
    assert attend.edges.tolist() == [0, 70, 71, 400]
    assert attend.edges.dtype == torch.int32
    assert attend.longest == 329
    with pytest.raises(ValueError, match="documents of one segment"):
        Varlen([Span(0, 2, -1), Span(2, 3, 0)])


def test_varlen_hands_the_kernel_packed_heads_in_the_values_dtype(monkeypatch):
    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert {x.dtype for x in (q, k, v)} == {BF16}
        assert (q.shape, k.shape, window_size, enable_gqa) == ((400, 4, 8), (400, 2, 8), (-1, 0), True)
        cuts = list(zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False))
        parts = [[x[a:b].float().transpose(0, 1)[None] for x in (q, k, v)] for a, b in cuts]
        done = [F.scaled_dot_product_attention(*p, is_causal=True, scale=scale, enable_gqa=True) for p in parts]
        return torch.cat([x[0].transpose(0, 1) for x in done]).to(q.dtype)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    q, k, v = (torch.randn(1, h, 400, 8, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
    found = Varlen(PLAIN)(q, k, v.to(BF16), 0.3)  # under autocast rotary embeddings leave fp32 queries and keys
    torch.testing.assert_close(found.float(), by_dense_mask(PLAIN)(q, k, v, 0.3), atol=0.05, rtol=0)


def test_masks_stay_small_in_a_long_pack():
    spans = [Span(0, 2000, -1), Span(2000, 3500, 0), Span(3500, 3530, 0), Span(3530, 3560, 0)]
    for count in (40, 50, 60) * 100:
        spans.append(Span(spans[-1].end, spans[-1].end + count, -1))
    for cut in (tiles(spans, 96, 96), tiles(spans, 256, join=False)):
        assert [tile.start for tile in cut[1:]] == [tile.end for tile in cut[:-1]]
        assert (cut[0].start, cut[-1].end) == (0, spans[-1].end)
        assert max(tile.mask.shape[0] for tile in cut if tile.mask is not None) <= 256
    assert sum(mask.numel() for mask in SdpaTiles(spans).masks if mask is not None) < spans[-1].end ** 2 / 50


def test_padding_is_seen_in_pieces_and_is_no_chain():
    spans = [Span(0, 10, -1), Span(10, 15, 0), Span(15, 1000, -1)]
    made = []
    found = layout(spans, 985, backend=lambda given, device: made.extend(given))
    assert found.reach == 15
    assert made[:2] == spans[:2]
    assert made[2:] == [Span(start, min(start + 128, 1000), -1) for start in range(15, 1000, 128)]


# Compiled layers ----------------------------------------------------------------------------------------------------


def test_a_compiled_layer_is_compiled_once_for_packs_of_one_length(tiny):
    lm = Backbone(tiny, layers=1).load(tiny)
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    layer = torch.compile(lm.model.layers[0], backend=count)
    hidden, positions = torch.randn(1, 90, lm.config.hidden_size), torch.arange(90)[None]
    rotary = lm.model.rotary_emb(hidden, positions)
    packs = [
        [Span(0, 90, -1)],
        [Span(0, 20, -1), Span(20, 90, -1)],
        [Span(0, 50, -1), Span(50, 60, 0), Span(60, 90, 0)],
    ]
    sizes = []
    for spans in packs:
        segments = layout(spans)
        found = layer(hidden, position_embeddings=rotary, segments=segments)
        expected = lm.model.layers[0](hidden, position_embeddings=rotary, segments=segments)
        torch.testing.assert_close(found, expected)
        sizes.append(len(compiled))
    assert sizes[0] > 0
    assert sizes == [sizes[0]] * 3
    torch._dynamo.reset()


def test_flex_attention_is_compiled_for_one_length_and_once_more_for_all_others(monkeypatch):
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    kernel = torch.compile(fused._plain(), backend=count)
    monkeypatch.setattr(fused, "_plain", lambda: kernel)
    for seed in range(4):  # other masks, other lengths
        spans = trees(seed)
        q, k, v = (torch.randn(1, h, spans[-1].end, 8, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
        torch.testing.assert_close(Flex(spans)(q, k, v, 0.3), SdpaTiles(spans)(q, k, v, 0.3), atol=1e-5, rtol=1e-5)
    assert len(compiled) == 2
    torch._dynamo.reset()
