"""vLLM in this process on the real SmolLM2: tied embeddings, a packed head, prompts longer than a block of its cache."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tulu_lightning.rollout.canary import canaries, prove, tolerance_of
from tulu_lightning.rollout.engine import RefreshError
from tulu_lightning.types import Sampling

SETTINGS = {"max_model_len": 512, "max_num_seqs": 16, "kv_cache_mb": 128}
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def engine(smol):
    from tulu_lightning.rollout.vllm import VLLMEngine

    engine = VLLMEngine.from_folder(smol, **SETTINGS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model(smol):
    return AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def moved(model):
    """SmolLM2 with every tensor moved by a hundredth of its spread, the embedding and so the tied head included."""
    generator = torch.Generator().manual_seed(2)
    weights = {
        name: tensor + 0.01 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }
    weights[HEAD] = weights["model.embed_tokens.weight"]
    return weights


@pytest.fixture(scope="module")
def prompts(smol):
    tokenizer = AutoTokenizer.from_pretrained(smol)
    story = "The miller's youngest son had nothing but a cat, and the cat asked him for a pair of boots. " * 9
    return [tokenizer(story + end)["input_ids"] for end in ("He laughed and", "So he", "The cat said:", "Then")]


def scores(model, sequences, weights=None):
    result = []
    for prompt, response in sequences:
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *response]])
            out = torch.func.functional_call(model, weights or {}, (ids,), {"use_cache": False})
        logp = torch.log_softmax(out.logits[0, len(prompt) - 1 : -1].float(), -1)
        result.append(logp.gather(1, torch.tensor(response)[:, None])[:, 0])
    return result


def sample(engine, prompts):
    return engine.generate(prompts, 1, Sampling(8), 11)


def test_a_refreshed_engine_equals_one_built_on_the_new_weights(engine, model, moved, prompts, tmp_path, smol):
    from tulu_lightning.rollout.vllm import VLLMEngine

    assert min(map(len, prompts)) > 150  # longer than a block: the second call reads them from the cache
    sample(engine, prompts)
    engine.refresh(moved.items(), 4)
    refreshed = sample(engine, prompts)
    changed = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32)
    changed.load_state_dict(moved)
    changed.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(smol).save_pretrained(tmp_path)
    fresh = VLLMEngine.from_folder(tmp_path, **SETTINGS)
    built = sample(fresh, prompts)
    fresh.close()
    for (a,), (b,), prompt in zip(refreshed, built, prompts, strict=True):
        assert torch.equal(a.ids_L, b.ids_L)
        assert torch.equal(a.logprobs_L, b.logprobs_L)
        (expected,) = scores(model, [(prompt, a.ids_L.tolist())], moved)
        assert torch.allclose(a.logprobs_L, expected, atol=1e-3)
    sample(engine, prompts[:1])  # closing the other one took nothing from this one


def test_a_head_that_stays_packed_as_it_was_is_named(engine, model, moved, monkeypatch):
    from tulu_lightning.rollout.vllm_worker import Worker

    engine.refresh(model.state_dict().items(), 0)
    # What stock vLLM does: its reload leaves the packed copy of a tied head alone.
    monkeypatch.setattr(Worker, "_tulu_repack", lambda self, model: None)
    with pytest.raises(RefreshError) as caught:
        engine.refresh(moved.items(), 5)
    assert caught.value.problems == {"not held as sent": (HEAD,)}
    with pytest.raises(RuntimeError, match="last weight refresh failed"):
        sample(engine, [[1]])


def test_a_prefix_cache_that_outlives_its_weights_is_caught_by_the_canaries(engine, model, moved, monkeypatch):
    sequences, tolerance = canaries(model.config.vocab_size), tolerance_of(torch.float32)
    engine.refresh(model.state_dict().items(), 5)
    prove(engine, lambda given: scores(model, given), sequences, tolerance)
    with monkeypatch.context() as patch:
        patch.setattr(type(engine._llm), "reset_prefix_cache", lambda self: True)
        engine.refresh(moved.items(), 6)
    with pytest.raises(RefreshError) as caught:
        prove(engine, lambda given: scores(model, given, moved), sequences, tolerance)
    assert "log-probs of given tokens differ" not in caught.value.problems  # vLLM computes those without its cache
    assert "log-probs of sampled tokens differ" in caught.value.problems
    assert "prefixes cached with the old weights" in str(caught.value)
    with pytest.raises(RuntimeError, match="last weight refresh failed"):
        sample(engine, [[1]])
    engine.refresh(moved.items(), 7)
    assert prove(engine, lambda given: scores(model, given, moved), sequences, tolerance).maximum < 1e-3


def test_bfloat16_is_within_the_tolerance_that_canaries_give_it(smol, model):
    from tulu_lightning.rollout.vllm import VLLMEngine

    engine = VLLMEngine.from_folder(smol, torch.bfloat16, **SETTINGS)
    engine.refresh(model.state_dict().items(), 1)
    tolerance = tolerance_of(engine.dtype)
    proof = prove(engine, lambda given: scores(model, given), canaries(model.config.vocab_size), tolerance)
    assert proof.mean > 1e-4
    engine.close()
