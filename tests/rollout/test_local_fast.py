"""The fast path of the engine in this process: which models it takes, slots that refill, prompts that rows share."""

import logging
from itertools import chain

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from tulu_lightning.rollout import batch, cached_attention, llama, packed_weights
from tulu_lightning.rollout.compiled import kernels
from tulu_lightning.rollout.engine import RefreshError
from tulu_lightning.rollout.llama import LlamaLM, recognise
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.types import Completion, Sampling

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
ROPE3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TAKEN = {
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama 3 positions": LlamaConfig(**SHAPE, rope_parameters=ROPE3),
    "wide heads": LlamaConfig(**SHAPE, head_dim=32),
    "biases everywhere": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "qwen 2": Qwen2Config(**SHAPE),
    "mistral without a window": MistralConfig(**SHAPE, sliding_window=None),
}
LEFT = {
    "mistral with a window": MistralConfig(**SHAPE, sliding_window=6),
    "norms of queries": Qwen3Config(**SHAPE, head_dim=8),
    "fused already": Phi3Config(**SHAPE),
    "other parts": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4),
    "another gate": LlamaConfig(**SHAPE, hidden_act="gelu"),
    "dynamic positions": LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    ),
    # Llama's parts by name, but with multipliers: only numbers tell.
    "granite": GraniteConfig(**SHAPE, residual_multiplier=0.5, logits_scaling=2.0),
}
GENERATOR = torch.Generator().manual_seed(0)
LONG = torch.randint(1, 300, (130,), generator=GENERATOR).tolist()


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(llama, "kernels", lambda *_: None)
    elif kernels("cpu", torch.float32, 4, 2, 16) is None:
        pytest.skip("no C++ compiler")


def build(config, seed: int = 0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def biased(model):
    """Biases are 0 at initialisation and would hide that they are left out."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.5)
    return model


@pytest.fixture(scope="module")
def model():
    return build(LlamaConfig(**SHAPE))


def fast(model, **options) -> LocalEngine:
    engine = LocalEngine.from_model(model, **options)
    engine.generate([[1]], 1, Sampling(1), 0)
    assert engine._fast is not None
    return engine


def agree(model, prompts, out: list[list[Completion]]) -> None:
    """Every log-prob is that of a forward over the whole sequence."""
    for prompt, group in zip(prompts, out, strict=True):
        for done in group:
            ids = torch.tensor([[*prompt, *done.ids_L.tolist()]])
            with torch.no_grad():
                logp = torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1], -1)
            assert torch.allclose(done.logprobs_L, logp.gather(1, done.ids_L[:, None])[:, 0], atol=1e-4)


def ids(out: list[list[Completion]]) -> list[list[int]]:
    return [done.ids_L.tolist() for group in out for done in group]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TAKEN)
def test_llama_shaped_models_are_taken_and_give_their_own_numbers(name, dtype):
    model = biased(build(TAKEN[name]))
    out = fast(model).generate([LONG[:40], LONG[:3]], 3, Sampling(8), 0)
    agree(model, [LONG[:40], LONG[:3]], out)
    assert recognise(build(TAKEN[name]).to(dtype)) is not None


def test_weights_of_two_dtypes_are_left_to_the_operators_that_know_them():
    model = build(TAKEN["tied"]).to(torch.bfloat16)
    model.model.norm.float()
    assert LlamaLM(model).compiled is None


@pytest.mark.parametrize("name", LEFT)
def test_other_models_keep_their_own_forward_and_the_log_says_why(name, caplog):
    model = build(LEFT[name])
    with caplog.at_level(logging.INFO):
        engine = LocalEngine.from_model(model)
        out = engine.generate([LONG[:12]], 2, Sampling(6), 0)
    assert engine._fast is None
    assert caplog.text.count("decoding with transformers' own forward") == 1
    agree(model, [LONG[:12]], out)


def test_a_row_that_waits_takes_the_slot_of_one_that_finished(model, monkeypatch):
    prompts = [LONG[i : i + 5 + i] for i in range(12)]
    wide = fast(model)
    stops = tuple(
        torch.tensor(ids(wide.generate(prompts, 2, Sampling(16), 4))).flatten().bincount().topk(12).indices.tolist()
    )
    sampling = Sampling(16, stop_ids=stops)
    expected = wide.generate(prompts, 2, sampling, 4)
    lengths = {len(each) for each in ids(expected)}
    assert len(lengths) > 3  # ragged, or this tests nothing

    engine, rows = fast(model, max_rows=4), []
    decode = batch.Batch._decode
    monkeypatch.setattr(batch.Batch, "_decode", lambda self: rows.append(len(self.rows)) or decode(self))
    assert ids(engine.generate(prompts, 2, sampling, 4)) == ids(expected)
    assert max(rows) == 4
    # Rows need one decoding step for each token after the first: with 4 at a time, nearly no slot stays empty.
    steps = sum(len(each) - 1 for each in ids(expected))
    assert sum(rows) == steps
    assert len(rows) < steps / 4 + 16
    agree(model, prompts, expected)


@pytest.mark.parametrize("limits", [{}, {"max_rows": 5}, {"max_rows": 1}, {"batch_tokens": 300}, {"batch_tokens": 1}])
def test_rows_that_share_a_long_prompt_get_what_they_would_alone(model, limits):
    prompts = [LONG, LONG[3:], LONG[:110], LONG]
    with_transformers = LocalEngine.from_model(model, decode="transformers")
    stops = tuple(range(0, 300, 12))
    for sampling in (Sampling(7), Sampling(20, stop_ids=stops)):
        out = fast(model, **limits).generate(prompts, 4, sampling, 2)
        assert ids(out) == ids(with_transformers.generate(prompts, 4, sampling, 2))
        agree(model, prompts, out)


def test_a_beginning_that_all_prompts_share_is_computed_once(model, monkeypatch):
    prompts = [[*LONG[:120], *LONG[i : i + 3 + i % 2]] for i in range(6)]
    engine = fast(model)
    tokens, embed = [], engine._model.get_input_embeddings()
    monkeypatch.setattr(embed, "forward", lambda x, f=embed.forward: tokens.append(x.numel()) or f(x))
    out = engine.generate(prompts, 1, Sampling(5), 2)
    assert tokens == [120, sum(len(prompt) - 120 for prompt in prompts), 6, 6, 6, 6]
    agree(model, prompts, out)
    agree(model, prompts, engine.generate(prompts, 3, Sampling(5, stop_ids=tuple(range(0, 300, 9))), 2))


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_what_follows_them_are_those_of_the_plain_matrix(dtype, packs, monkeypatch):
    if not packs:
        monkeypatch.setattr(packed_weights, "packs", lambda dtype: False)
    weight, bias, x, other = (torch.randn(*shape).to(dtype) for shape in ((24, 16), (24,), (7, 16), (7, 24)))
    expected = x.float() @ weight.float().T + bias.float()
    matrix = packed_weights.Matrix([("a", 20), ("b", 4)], weight, bias)
    assert (matrix.packed is not None) == packed_weights.packs(dtype)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    for found, right in (
        (matrix(x), expected),
        (matrix.plus(x, other), expected + other.float()),
    ):
        assert found.dtype == dtype
        assert torch.allclose(found.float(), right, **tolerance)
    names, parts = zip(*matrix.used(), strict=True)
    assert names == ("a", "b")
    assert torch.equal(torch.cat(parts), weight)


def test_without_packing_the_numbers_stay(model, monkeypatch):
    packed = fast(model).generate([LONG], 3, Sampling(8), 0)
    monkeypatch.setattr(packed_weights, "packs", lambda dtype: False)
    plain = fast(model).generate([LONG], 3, Sampling(8), 0)
    assert ids(packed) == ids(plain)


def test_without_the_kernel_the_numbers_stay(model, monkeypatch):
    kernel = fast(model).generate([LONG, LONG[:7]], 3, Sampling(8), 0)
    monkeypatch.setattr(cached_attention, "_has_kernel", lambda: False)
    assert ids(fast(model).generate([LONG, LONG[:7]], 3, Sampling(8), 0)) == ids(kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_refresh_reaches_the_packed_copies(tied, dtype):
    config = LlamaConfig(**SHAPE, tie_word_embeddings=tied)
    engine, new = fast(build(config), dtype=dtype), build(config, seed=1)
    before = engine.fingerprint()
    engine.refresh(new.state_dict().items(), 1)
    fresh = fast(new, dtype=dtype)
    assert engine.fingerprint() == fresh.fingerprint() != before
    canary = [(LONG[:9], LONG[9:20])]
    assert torch.equal(engine.logprobs(canary)[0], fresh.logprobs(canary)[0])
    out, expected = (each.generate([LONG[:9]], 2, Sampling(6), 0) for each in (engine, fresh))
    assert ids(out) == ids(expected)


@pytest.mark.skipif(not packed_weights.packs(torch.float32), reason="this machine does not pack weights")
def test_packed_copies_that_were_not_made_anew_are_caught(model, monkeypatch):
    engine, new = fast(model), build(LlamaConfig(**SHAPE), seed=1)
    monkeypatch.setattr(LlamaLM, "repack", lambda self: None)
    with pytest.raises(RefreshError) as caught:
        engine.refresh(new.state_dict().items(), 1)
    stale = caught.value.problems["not held as sent"]
    assert {name for name, weight in new.named_parameters() if weight.dim() == 2} - set(stale) == {
        "model.embed_tokens.weight"  # looked up in the plain matrix
    }


@pytest.mark.skipif(not packed_weights.packs(torch.float32), reason="this machine does not pack weights")
def test_one_stale_packed_copy_shows_in_the_canary_and_in_the_fingerprint(model):
    engine, canary = fast(model), [(LONG[:9], LONG[9:20])]
    right, marks = engine.logprobs(canary)[0], engine.fingerprint()
    assert engine._fast is not None
    matrix = engine._fast.layers[1].down
    true, matrix.weight_NK = matrix.weight_NK, matrix.weight_NK.roll(1, 0)
    matrix.pack()
    matrix.weight_NK = true  # the plain matrix is right, what is computed with is not
    assert (engine.logprobs(canary)[0] - right).abs().max() > 1e-3
    wrong = engine.fingerprint()
    assert [name for name in marks if marks[name] != wrong[name]] == ["model.layers.1.mlp.down_proj.weight"]


def test_finished_rows_are_all_handed_out_once(model):
    seen = []
    out = fast(model, max_rows=3).generate(
        [LONG[:4], LONG[:9]], 5, Sampling(6, stop_ids=tuple(range(0, 300, 7))), 0, progress=lambda *x: seen.append(x)
    )
    assert len(list(chain(*out))) == 10
    assert seen[-1] == (10, 10)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
