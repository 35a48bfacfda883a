"""The one proof behind packing, prefix sharing and ragged batches: packed equals each chain of segments run alone.

The reference is transformers' own Llama with its own attention, one unpadded sequence at a time.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tulu_lightning.core.packing import ancestors, pack
from tulu_lightning.models.attention import layout
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.models.backends import Chooser
from tulu_lightning.types import Span

BACKENDS = pytest.mark.parametrize("backend", ["auto", "sdpa"])  # on a CPU: matrix products, and PyTorch's kernel


@pytest.fixture(scope="module", params=[2, 4, 1], ids=["2 key heads", "4 key heads", "1 key head"])
def llama(request, tmp_path_factory):
    """Folder of a random Llama with 4 query heads: grouped, each with its own keys, all with the same."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=request.param,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def chains(document):
    """Each scored segment's full text (its parents' tokens before its own) and which of its tokens are scored."""
    for segment in document.segments:
        ids, parent = [segment.ids_L], segment.parent
        while parent >= 0:
            ids.insert(0, document.segments[parent].ids_L)
            parent = document.segments[parent].parent
        text = torch.cat(ids)
        before = text.numel() - segment.ids_L.numel()
        scored = [before + i for i in range(segment.ids_L.numel()) if segment.weights_L[i] > 0 and before + i > 0]
        if scored:
            yield text, torch.tensor(scored)


def alone(model, documents):
    """Logits that predict every scored token, each chain by itself."""
    rows = []
    for document in documents:
        for text, scored in chains(document):
            rows.append(model(text[None]).logits[0][scored - 1])
    return torch.cat(rows)


def packed_logits(model, packed):
    hidden = model.source_hidden(model.lm.get_decoder(), packed)
    return hidden @ model.lm.get_output_embeddings().weight.T


def test_real_llama_logits_equal_in_fp32(smol, documents):
    documents = documents(49152)
    reference = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32)
    model = PackedLM(Backbone(smol), smol)
    with torch.no_grad():
        expected = alone(reference, documents)
        found = packed_logits(model, pack(documents))
        model.attention = Chooser("sdpa", torch.float32)
        by_kernel = packed_logits(model, pack(documents))
    # Logits reach about 20 in size, where fp32 resolves 2e-6: the tolerance is 1e-5 of the largest.
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (by_kernel - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_real_llama_gradients_equal_in_fp32(smol, documents):
    documents = [d for d in documents(49152) if sum(s.ids_L.numel() for s in d.segments) < 100]
    packed = pack(documents)
    up = torch.randn(packed.target_N.numel(), generator=torch.Generator().manual_seed(0))
    model = PackedLM(Backbone(smol, layers=3), smol)
    reference = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32, num_hidden_layers=3)
    (model(packed).logp_N @ up).backward()
    expected = alone(reference, documents).log_softmax(-1).gather(1, packed.target_N[:, None])[:, 0]
    (expected @ up).backward()
    same_gradients(model.lm, reference)


def same_gradients(ours, theirs):
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - theirs[name].grad).abs().max() <= 1e-5 * theirs[name].grad.abs().max(), name


def exact_norm(self, hidden):
    """transformers rounds to fp32 in its norms, in an fp64 model too: a last bit that falls otherwise would show."""
    return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


@pytest.mark.slow
def test_real_llama_logits_equal_to_1e_9_in_fp64(smol, documents, monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    documents = documents(49152)[4:7]  # pairs, and a group of four
    reference = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float64)
    model = PackedLM(Backbone(smol), smol).double()
    model.lm.model.rotary_emb = reference.model.rotary_emb
    with torch.no_grad():
        torch.testing.assert_close(
            packed_logits(model, pack(documents)), alone(reference, documents), atol=1e-9, rtol=0
        )


@BACKENDS
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pad_to", [0, 512])
def test_log_probs_and_gradients_equal_alone(llama, documents, checkpointing, pad_to, backend):
    documents = documents(256)
    reference = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model = PackedLM(Backbone(llama, activation_checkpointing=checkpointing, attention=backend), llama)
    packed = pack(documents, pad_to=pad_to, pad_id=3)
    assert bool(packed.padding) == bool(pad_to)
    up = torch.randn(packed.target_N.numel(), generator=torch.Generator().manual_seed(0))
    logp = model(packed).logp_N
    (logp @ up).backward()
    expected = alone(reference, documents).log_softmax(-1).gather(1, packed.target_N[:, None])[:, 0]
    (expected @ up).backward()
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)
    same_gradients(model.lm, reference)


@BACKENDS
def test_no_document_or_sibling_sees_another(llama, documents, backend):
    documents = documents(256)
    model = PackedLM(Backbone(llama, attention=backend), llama)
    packed = pack(documents, pad_to=64)
    with torch.no_grad():
        before = model(packed).logp_N
        for index in range(len(packed.spans)):
            span = packed.spans[index]
            tokens = packed.tokens_T.clone()
            tokens[span.start : span.end] = (tokens[span.start : span.end] + 1) % 256
            after = model(packed._replace(tokens_T=tokens)).logp_N
            moved = {int(s) for s in packed.segment_N[(after - before).abs() > 1e-6]}
            assert moved <= descendants(packed.spans, index), f"segment {index} moved {moved}"


@BACKENDS
def test_the_gradient_of_a_documents_loss_stays_in_the_document(llama, documents, backend):
    model = PackedLM(Backbone(llama, attention=backend), llama)
    packed = pack(documents(256), pad_to=64)
    embeddings = model.lm.get_input_embeddings()
    inputs = []
    embeddings.register_forward_hook(lambda module, args, out: inputs.append(out) or out.retain_grad())
    logp_N = model(packed).logp_N
    for segment in {int(s) for s in packed.segment_N}:
        inputs[0].grad = None
        logp_N[packed.segment_N == segment].sum().backward(retain_graph=True)
        # A segment's last token predicts nothing of the segment, and the gradient does not reach it.
        own = packed.spans[segment].end - packed.spans[segment].start > 1
        seen = {*ancestors(packed.spans, segment), *([segment] if own else [])}
        for index, span in enumerate(packed.spans):
            reached = bool(inputs[0].grad[0, span.start : span.end].any())
            assert reached == (index in seen), f"segment {segment}, tokens of segment {index}"


@BACKENDS
def test_bf16_log_probs_are_as_near_to_fp32_as_alone(llama, documents, backend):
    documents = documents(256)
    packed = pack(documents)
    reference = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model = PackedLM(Backbone(llama, compute_dtype="bfloat16", attention=backend), llama)
    with torch.no_grad():
        exact = alone(reference, documents).log_softmax(-1).gather(1, packed.target_N[:, None])[:, 0]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = alone(reference, documents)
        theirs = rounded.float().log_softmax(-1).gather(1, packed.target_N[:, None])[:, 0]
        ours = model(packed).logp_N
    assert (ours - exact).pow(2).mean() <= 1.1 * (theirs - exact).pow(2).mean()


def test_padding_is_no_row_and_may_be_longer_than_a_sliding_window(tmp_path, documents):
    config = MistralConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=40, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    short = [documents(60)[1]]  # 20 tokens
    model = PackedLM(Backbone(str(tmp_path)), str(tmp_path))
    padded = pack(short, [5], pad_to=1000)
    assert padded.padding == 980
    assert padded.spans[-1] == Span(20, 1000, -1)
    with torch.no_grad():
        torch.testing.assert_close(model(padded).logp_N, model(pack(short)).logp_N)


def descendants(spans, index):
    found = {index}
    for child, span in enumerate(spans):
        if span.parent in found:
            found.add(child)
    return found


def test_a_cache_or_a_mask_cannot_slip_in(tiny):
    model = PackedLM(Backbone(tiny), tiny)
    assert model.lm.config.use_cache is False
    with pytest.raises(ValueError, match="neither an attention mask nor dropout"):
        model.lm.model(
            torch.zeros(1, 4, dtype=torch.long),
            attention_mask=torch.ones(1, 1, 4, 4),
            segments=layout([Span(0, 4, -1)]),
        )
