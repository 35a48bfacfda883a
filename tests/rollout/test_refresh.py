import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tulu_lightning.rollout.engine import RefreshError
from tulu_lightning.rollout.fingerprint import fingerprint
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.types import Sampling

EMBED, HEAD, SQUARE = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"


def llama(seed: int, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            initializer_range=0.3,
        )
    )


@pytest.fixture
def engine():
    return LocalEngine.from_model(llama(0), torch.float32)


def new_weights() -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in llama(1).state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_a_refresh_the_engine_samples_from_the_new_weights(dtype):
    engine, sampling = LocalEngine.from_model(llama(0), dtype), Sampling(6, 0.0)
    old = engine.generate([[1, 2, 3]], 1, sampling, 0)[0][0]
    engine.refresh(new_weights().items(), 7)
    new = engine.generate([[1, 2, 3]], 1, sampling, 0)[0][0]
    built = LocalEngine.from_model(llama(1), dtype).generate([[1, 2, 3]], 1, sampling, 0)[0][0]
    assert (engine.version, old.version, new.version) == (7, 0, 7)
    assert torch.equal(new.ids_L, built.ids_L)
    assert torch.equal(new.logprobs_L, built.logprobs_L)
    assert not torch.equal(new.logprobs_L, old.logprobs_L)
    assert engine.fingerprint() == fingerprint(llama(1).state_dict().items(), dtype)


def test_the_engine_owns_its_copy():
    model = llama(0)
    engine = LocalEngine.from_model(model)
    before = engine.fingerprint()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert engine.fingerprint() == before


def test_a_skipped_tensor_is_caught_and_the_engine_refuses_to_sample(engine):
    weights = new_weights()
    del weights[SQUARE]
    with pytest.raises(RefreshError, match=f"not delivered: {SQUARE}") as caught:
        engine.refresh(weights.items(), 1)
    assert caught.value.problems == {"not delivered": (SQUARE,)}
    assert engine.version == -1
    with pytest.raises(RuntimeError, match="last weight refresh failed"):
        engine.generate([[1]], 1, Sampling(1), 0)
    engine.refresh(new_weights().items(), 2)
    assert engine.generate([[1]], 1, Sampling(1), 0)[0][0].version == 2


def test_a_square_transposed_on_the_way_is_caught_by_the_senders_fingerprint(engine):
    weights = new_weights()
    expected = fingerprint(weights.items(), engine.dtype)
    weights[SQUARE] = weights[SQUARE].T
    with pytest.raises(RefreshError) as caught:
        engine.refresh(weights.items(), 1, expected=expected)
    assert caught.value.problems == {"not held as expected": (SQUARE,)}


def test_a_square_transposed_while_stored_is_caught(engine, monkeypatch):
    weights = new_weights()

    def wrong(target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source.T if source is not None and torch.equal(source, weights[SQUARE]) else source)

    monkeypatch.setattr(LocalEngine, "_store", staticmethod(wrong))
    with pytest.raises(RefreshError) as caught:
        engine.refresh(weights.items(), 1)
    assert caught.value.problems == {"not held as sent": (SQUARE,)}


@pytest.mark.parametrize("order", [(EMBED, HEAD), (HEAD, EMBED)])
def test_a_tied_head_that_differs_from_its_embedding_is_caught(engine, order):
    weights = new_weights()
    weights[HEAD] = llama(2).lm_head.weight.detach()
    for name in order:
        weights[name] = weights.pop(name)  # sent in this order
    with pytest.raises(RefreshError) as caught:
        engine.refresh(weights.items(), 1)
    assert caught.value.problems == {"not held as sent": (order[0],)}


@pytest.mark.parametrize("left_out", [EMBED, HEAD])
def test_one_of_two_tied_tensors_is_enough(engine, left_out):
    weights = new_weights()
    del weights[left_out]
    engine.refresh(weights.items(), 1)
    assert engine.fingerprint() == fingerprint(llama(1).state_dict().items())


def test_an_untied_head_must_be_sent():
    engine, weights = LocalEngine.from_model(llama(0, tied=False)), dict(llama(1, tied=False).state_dict())
    del weights[HEAD]
    with pytest.raises(RefreshError, match=f"not delivered: {HEAD}"):
        engine.refresh(weights.items(), 1)


def test_unknown_names_and_other_shapes_are_listed(engine):
    weights = new_weights()
    weights["value_head.weight"] = torch.zeros(1, 32)
    weights[SQUARE] = torch.zeros(32, 16)
    with pytest.raises(RefreshError) as caught:
        engine.refresh(weights.items(), 1)
    assert caught.value.problems["unknown"] == ("value_head.weight",)
    assert caught.value.problems["of another shape"] == (f"{SQUARE} (32, 16) for (32, 32)",)
    assert caught.value.problems["not delivered"] == (SQUARE,)


def test_building_an_engine_leaves_random_state_and_the_model_alone():
    model = llama(0)
    model.config._attn_implementation = "eager"
    torch.manual_seed(3)
    state = torch.get_rng_state()
    LocalEngine.from_model(model, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == "eager"
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_rotary_frequencies_stay_in_float32():
    # Cast to bfloat16 they would turn distant positions into other ones.
    engine, reference = LocalEngine.from_model(llama(0), torch.bfloat16), llama(0)
    assert torch.equal(engine._model.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)
