"""Packed attention by the fused kernels: taken, exact against one process of fp32 on the CPU, and blind across documents."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig

from tulu_lightning.core.packing import pack
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.models.backends import BACKENDS, Chooser, Machine, candidates, trial
from tulu_lightning.models.fused import Flex
from tulu_lightning.models.tiles import SdpaTiles
from tulu_lightning.types import Span

pytestmark = pytest.mark.gpu
FP32, BF16 = torch.float32, torch.bfloat16
HEADS = {"smollm2-135m": (9, 3, 64), "llama-1b": (32, 8, 64), "llama-8b": (32, 8, 128), "no groups": (4, 4, 64)}
FUSED = [
    ("varlen", BF16, False),
    ("flex", BF16, False),
    ("flex", BF16, True),
    ("flex", FP32, False),
    ("flex", FP32, True),
]


def shape(heads, key_heads, width):
    return LlamaConfig(hidden_size=heads * width, num_attention_heads=heads, num_key_value_heads=key_heads)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("name", "dtype", "trees"), FUSED)
def test_the_fused_kernels_pass_their_trial(name, dtype, trees, heads, device):
    if device.type != "cuda":
        pytest.skip("a kernel of GPUs")
    assert trial(name, trees, device, dtype, shape(*heads)) is None


def test_auto_takes_flash_attention_for_documents_and_flex_for_shared_prompts(device):
    if device.type != "cuda":
        pytest.skip("a kernel of GPUs")
    chooser = Chooser("auto", BF16)
    for trees in (False, True):
        assert candidates("auto", trees, Machine.of("cuda"))[0] == ("flex" if trees else "varlen")
        assert chooser.backend(trees, device, shape(32, 8, 64)) is BACKENDS["flex" if trees else "varlen"]


def on(device, packed):
    return type(packed)(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in packed))


def results(folder, packed, device, backend, dtype):
    """Log-probs and all gradients, on the CPU in fp32."""
    model = PackedLM(Backbone(folder, compute_dtype=str(dtype)[6:], attention=backend), folder).to(device)
    up = torch.linspace(-1, 1, packed.target_N.numel()).to(device)
    logp = model(on(device, packed)).logp_N
    (logp @ up).backward()
    return logp.detach().cpu(), {
        name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize(
    ("backend", "dtype"), [("sdpa", FP32), ("flex", FP32), ("sdpa", BF16), ("flex", BF16), ("auto", BF16)]
)
@pytest.mark.parametrize("trees", [False, True])
def test_log_probs_and_gradients_are_those_of_the_cpu_in_fp32(backend, dtype, trees, tiny, documents, device):
    if device.type != "cuda" and backend == "flex":
        pytest.skip("a kernel of GPUs")
    packed = pack([d for d in documents(256) if trees or len(d.segments) == 1])
    logp, grads = results(tiny, packed, device, backend, dtype)
    expected, wanted = results(tiny, packed, torch.device("cpu"), "auto", FP32)
    tolerance = 1e-4 if dtype == FP32 else 2e-2
    assert (logp - expected).abs().max() <= tolerance * expected.abs().max()
    for name, grad in grads.items():
        assert (grad - wanted[name]).norm() <= 2 * tolerance * wanted[name].norm(), name


@pytest.mark.parametrize(("backend", "dtype"), [("auto", BF16), ("flex", BF16), ("sdpa", BF16), ("flex", FP32)])
def test_no_document_sees_another(backend, dtype, tiny, documents, device):
    if device.type != "cuda" and backend == "flex":
        pytest.skip("a kernel of GPUs")
    packed = on(device, pack([d for d in documents(256) if len(d.segments) == 1]))
    model = PackedLM(Backbone(tiny, compute_dtype=str(dtype)[6:], attention=backend), tiny).to(device)
    with torch.no_grad():
        before = model(packed).logp_N
        for index, span in enumerate(packed.spans):
            tokens = packed.tokens_T.clone()
            tokens[span.start : span.end] = (tokens[span.start : span.end] + 1) % 256
            after = model(packed._replace(tokens_T=tokens)).logp_N
            assert {int(s) for s in packed.segment_N[after != before]} <= {index}


def packs(count, seed=0):
    """Groups with a shared prompt, cut into packs of very different lengths and numbers of segments."""
    g = torch.Generator().manual_seed(seed)

    def length(most):
        return int(torch.randint(1, most, (), generator=g))

    for _ in range(count):
        spans, end = [], 0
        for _ in range(length(9)):
            parent, prompt = len(spans), length(300)
            spans.append(Span(end, end + prompt, -1))
            end += prompt
            for _ in range(length(6)):
                answer = length(200)
                spans.append(Span(end, end + answer, parent))
                end += answer
        yield spans


def test_packs_of_every_size_share_a_few_compiled_kernels(device):
    """A kernel that is compiled anew for each pack would soon be given up for the unfused T x T computation."""
    if device.type != "cuda":
        pytest.skip("a kernel of GPUs")
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for spans in packs(40):
            size = (1, 4, spans[-1].end, 64)
            q, k, v = (torch.randn(size, device=device, dtype=BF16, requires_grad=True) for _ in range(3))
            found = Flex(spans, device)(q, k, v, 0.125)
            grads = torch.autograd.grad(found.float().square().sum(), (q, k, v))
            expected = SdpaTiles(spans, device)(q, k, v, 0.125)
            wanted = torch.autograd.grad(expected.float().square().sum(), (q, k, v))
            assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()
            for one, other in zip(grads, wanted, strict=True):
                assert (one - other).norm() <= 2e-2 * other.norm()
    assert counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("gradient", [True, False])
def test_packs_below_a_block_run_whatever_heads_are_grouped(group, gradient, device):
    """torch's own choice of a kernel has none for some of these."""
    if device.type != "cuda":
        pytest.skip("a kernel of GPUs")
    torch._dynamo.reset()
    for tokens in (5, 20, 40, 70, 127, 128):
        spans = [Span(0, 2, -1), Span(2, 4, 0), Span(4, tokens, 0)]
        q, k, v = (
            torch.randn(1, heads, tokens, 64, device=device, dtype=BF16) for heads in (8, 8 // group, 8 // group)
        )
        with torch.set_grad_enabled(gradient):
            found = Flex(spans, device)(q.requires_grad_(gradient), k, v, 0.125)
        expected = SdpaTiles(spans, device)(q, k, v, 0.125)
        assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()


def test_long_packs_take_memory_in_proportion_to_their_tokens(device):
    """32k tokens: scores of one head alone would be 2 GB."""
    if device.type != "cuda":
        pytest.skip("counts a GPU's memory")
    tokens, heads = 32768, 8
    spans = [Span(0, 4096, -1), *(Span(start, start + 2048, 0) for start in range(4096, tokens, 2048))]
    plain = [Span(start, start + 4096, -1) for start in range(0, tokens, 4096)]
    for name, edges in (("flex", spans), ("flex", plain), ("varlen", plain), ("sdpa", plain), ("sdpa", spans)):
        q, k, v = (torch.randn(1, heads, tokens, 64, device=device, dtype=BF16, requires_grad=True) for _ in range(3))
        attend = BACKENDS[name](edges, device)
        attend(q, k, v, 0.125).sum().backward()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        attend(q, k, v, 0.125).sum().backward()
        taken = torch.cuda.max_memory_allocated(device) - before
        assert taken < 24 * q.numel() * q.element_size(), f"{name}: {taken / 1e6:.0f} MB"
