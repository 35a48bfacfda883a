"""The one proof behind packing, prefix sharing and ragged batches: packed equals each chain of segments run alone.

The reference is transformers' own Llama with its own attention, one unpadded sequence at a time.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tulu_lightning.core.packing import pack
from tulu_lightning.models.attention import tiles
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.types import Document, Segment


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
    with torch.no_grad():
        expected = alone(reference, documents)
        found = packed_logits(PackedLM(Backbone(smol), smol), pack(documents))
    # Logits reach about 20 in size, where fp32 resolves 2e-6: the tolerance is 1e-5 of the largest.
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_real_llama_logits_equal_to_1e_9_in_fp64(smol, documents):
    documents = documents(49152)[4:7]  # pairs, and a group of four
    reference = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float64)
    model = PackedLM(Backbone(smol), smol).double()
    model.lm.model.rotary_emb = reference.model.rotary_emb
    with torch.no_grad():
        torch.testing.assert_close(
            packed_logits(model, pack(documents)), alone(reference, documents), atol=1e-9, rtol=0
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probs_and_gradients_equal_alone(tiny, documents, checkpointing):
    documents = documents(256)
    reference = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model = PackedLM(Backbone(tiny, activation_checkpointing=checkpointing), tiny)
    packed = pack(documents)
    up = torch.randn(packed.target_N.numel(), generator=torch.Generator().manual_seed(0))
    logp = model(packed).logp_N
    (logp @ up).backward()
    expected = alone(reference, documents).log_softmax(-1).gather(1, packed.target_N[:, None])[:, 0]
    (expected @ up).backward()
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)
    theirs = dict(reference.named_parameters())
    for name, parameter in model.lm.named_parameters():
        assert (parameter.grad - theirs[name].grad).abs().max() <= 1e-5 * theirs[name].grad.abs().max(), name


def test_no_document_or_sibling_sees_another(tiny, documents):
    documents = documents(256)
    model = PackedLM(Backbone(tiny), tiny)
    packed = pack(documents)
    with torch.no_grad():
        before = model(packed).logp_N
        for index in range(len(packed.spans)):
            span = packed.spans[index]
            tokens = packed.tokens_T.clone()
            tokens[span.start : span.end] = (tokens[span.start : span.end] + 1) % 256
            after = model(packed._replace(tokens_T=tokens)).logp_N
            moved = {int(s) for s in packed.segment_N[(after - before).abs() > 1e-6]}
            assert moved <= descendants(packed.spans, index), f"segment {index} moved {moved}"


def descendants(spans, index):
    found = {index}
    for child, span in enumerate(spans):
        if span.parent in found:
            found.add(child)
    return found


def test_masks_stay_small_in_a_long_pack():
    def segment(tokens, parent=-1):
        return Segment(torch.zeros(tokens, dtype=torch.long), torch.ones(tokens), parent)

    documents = [Document((segment(2000), segment(1500, 0), segment(30, 0), segment(30, 0)))] + [
        Document((segment(n),)) for n in (40, 50, 60) * 100
    ]
    packed = pack(documents)
    tokens = packed.tokens_T.numel()
    cut = tiles(packed.spans)
    assert [tile.start for tile in cut[1:]] == [tile.end for tile in cut[:-1]]
    assert (cut[0].start, cut[-1].end) == (0, tokens)
    assert sum(tile.mask.numel() for tile in cut if tile.mask is not None) < tokens**2 / 20


def test_a_cache_or_a_mask_cannot_slip_in(tiny):
    model = PackedLM(Backbone(tiny), tiny)
    assert model.lm.config.use_cache is False
    with pytest.raises(ValueError, match="neither an attention mask nor dropout"):
        model.lm.model(torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 1, 4, 4), segment_tiles=())
