"""A pair whose common start is computed once is two sequences that are computed one by one: log-probs and gradients."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tulu_lightning.core.packing import pack
from tulu_lightning.core.pairs import side_lengths
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.models.lora import Lora, without_adapters
from tulu_lightning.models.weights import plain_weights
from tulu_lightning.stages.reference import pair_logps
from tulu_lightning.types import Document, Segment

LORA = pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
SHAPES = ((40, 25, 30), (7, 1, 12), (90, 3, 1), (1, 20, 20))
"""Tokens of start, chosen, rejected. A start of one token is what is left where nothing is shared."""


def pairs(vocabulary, seed=0):
    """Multi-turn pairs: stretches of the common start are scored, as are all of the rests but a user's turn in each."""
    g = torch.Generator().manual_seed(seed)

    def segment(tokens, scored, parent=-1):
        weights = torch.zeros(tokens)
        weights[scored] = 1.0
        return Segment(torch.randint(0, vocabulary, (tokens,), generator=g), weights, parent)

    return [
        Document((segment(start, slice(5, 20)), segment(chosen, slice(0, 9), 0), segment(rejected, slice(0, 7), 0)))
        for start, chosen, rejected in SHAPES
    ]


def sequences(document):
    """Chosen and rejected as whole sequences: ids and which of them are scored; nothing comes before the first."""
    start, *sides = document.segments
    for side in sides:
        scored = torch.cat([start.weights_L, side.weights_L]) > 0
        scored[0] = False
        yield torch.cat([start.ids_L, side.ids_L]), scored


def adapted(folder, lora):
    """The model, its adapters moved away from zero."""
    model = PackedLM(Backbone(folder, lora=lora), folder)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=g))
    return model


@LORA
@pytest.mark.parametrize("pad_to", [pytest.param(0, marks=pytest.mark.slow), 64])
def test_log_probs_of_the_real_model_are_those_of_two_runs(smol, lora, pad_to):
    model = adapted(smol, lora)
    alone = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32)
    alone.load_state_dict(dict(plain_weights(model.lm)), strict=False)
    documents = pairs(49152)
    packed = pack(documents, range(len(documents)), pad_to)
    with torch.no_grad():
        found = torch.stack(list(pair_logps(model, packed)), 1)
        with without_adapters(model.lm):
            base = torch.stack(list(pair_logps(model, packed)), 1)
        for ours, reference in ((found, alone), (base, start)):
            for row, document in enumerate(documents):
                for side, (ids, scored) in enumerate(sequences(document)):
                    logp = reference(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
                    expected = logp[scored[1:]].sum()
                    # Random tokens have about -12 each; fp32 resolves a sum of 24 of them to 3e-5.
                    assert abs(ours[row, side] - expected) <= 1e-5 * abs(expected), (row, side)
    if lora is not None:
        assert (found - base).abs().max() > 0.1, "the adapters do something"


@LORA
def test_gradients_are_those_of_two_runs(tiny, lora):
    """Of sums over both sides with weights of either sign; each side is also run as a plain sequence, by itself."""
    documents = pairs(200)
    up = torch.randn(len(documents), 2, generator=torch.Generator().manual_seed(2))
    together, apart = adapted(tiny, lora), adapted(tiny, lora)
    logps = torch.stack(list(pair_logps(together, pack(documents, range(len(documents)), 64))), 1)
    (logps * up).sum().backward()
    for row, document in enumerate(documents):
        for side, (ids, scored) in enumerate(sequences(document)):
            logp = apart(pack([Document((Segment(ids, scored.float()),))])).logp_N.sum()
            assert abs(logp - logps[row, side]) <= 1e-5 * abs(logp)
            (logp * up[row, side]).backward()
    expected = dict(apart.named_parameters())
    trained = [name for name, parameter in together.named_parameters() if parameter.grad is not None]
    assert trained
    assert all((".lora_" in name) == (lora is not None) for name in trained)
    for name, parameter in together.named_parameters():
        if name in trained:
            theirs = expected[name].grad
            assert (parameter.grad - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


def test_lengths_count_what_the_log_probs_sum(tiny):
    (document,) = pairs(200)[:1]
    lengths = side_lengths(pack([document], [0], 64))
    counts = [int(scored.sum()) for _, scored in sequences(document)]
    assert [int(side) for side in lengths] == counts == [15 + 9, 15 + 7]
