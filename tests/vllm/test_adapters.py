"""Adapters pushed to vLLM beside a base that stays: it samples from both, and a push is proved."""

import pytest
import torch
from moved_policies import LORA, policy, scores
from transformers import AutoModelForCausalLM

from tulu_lightning.models.lora import adapter_weights
from tulu_lightning.models.weights import plain_weights
from tulu_lightning.rollout import adapter_proof
from tulu_lightning.rollout.canary import canaries, prove, tolerance_of
from tulu_lightning.rollout.engine import RefreshError
from tulu_lightning.types import Sampling

SETTINGS = {"max_model_len": 256, "kv_cache_mb": 64, "lora": LORA}
NAME = "model.layers.1.self_attn.v_proj.lora_B.weight"
PROMPT = list(range(1, 150))  # longer than a block of the prefix cache


def build(kind, folder, **changes):
    if kind == "vllm":
        from tulu_lightning.rollout.vllm import VLLMEngine

        return VLLMEngine.from_folder(folder, **{**SETTINGS, **changes})
    from tulu_lightning.rollout.server import ServerEngine

    return ServerEngine.started(folder, **{**SETTINGS, **changes})


@pytest.fixture(scope="module", params=["vllm", "server"])
def engine(request, tiny):
    engine = build(request.param, tiny)
    yield engine
    engine.close()


def test_it_samples_from_base_and_adapters_and_from_nothing_older(engine, tiny):
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    told = []
    for version, model in enumerate([base, policy(tiny, 1), policy(tiny, 2)]):
        if version:
            engine.refresh(adapter_weights(model), version)
        completion = engine.generate([PROMPT], 1, Sampling(8), 3)[0][0]
        assert completion.version == engine.version == version
        response = completion.ids_L.tolist()
        assert torch.allclose(completion.logprobs_L, scores(model, PROMPT, response), atol=1e-3)
        assert torch.allclose(engine.logprobs([(PROMPT, response)])[0], completion.logprobs_L, atol=1e-3)
        told.append(scores(base, PROMPT, response) - completion.logprobs_L)
    assert all(gap.abs().max() > 0.05 for gap in told[1:]), "the adapters change nothing that could be seen"


def test_canaries_hold_the_trainers_side_against_it(engine, tiny):
    model = policy(tiny, 4)
    engine.refresh(adapter_weights(model), 7)
    own = lambda sequences: [scores(model, *each) for each in sequences]  # noqa: E731
    proof = prove(engine, own, canaries(256), tolerance_of(torch.float32))
    assert proof is not None
    other = policy(tiny, 5)
    with pytest.raises(RefreshError):
        prove(engine, lambda s: [scores(other, *each) for each in s], canaries(256), tolerance_of(torch.float32))


def test_only_adapters_travel_and_their_marks_are_known(engine, tiny):
    model = policy(tiny, 6)
    engine.refresh(adapter_weights(model), 8)
    sent = dict(adapter_weights(model))
    assert set(engine.fingerprint()) == set(sent)
    assert sum(x.numel() for x in sent.values()) < 0.2 * sum(x.numel() for x in model.parameters())


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda named: named.pop(NAME), "not delivered"),
        (lambda named: named.update({NAME: named[NAME].T.contiguous()}), "of another shape"),
        (lambda named: named.update({"model.norm.weight": torch.ones(64)}), "unknown"),
    ],
)
def test_what_is_missing_or_other_is_named_and_nothing_is_sampled(engine, tiny, spoil, kind):
    named = dict(adapter_weights(policy(tiny, 7)))
    spoil(named)
    with pytest.raises(RefreshError) as caught:
        engine.refresh(named.items(), 9)
    assert kind in caught.value.problems
    with pytest.raises(RuntimeError, match="no known weights"):
        engine.generate([[1]], 1, Sampling(1), 0)
    engine.refresh(adapter_weights(policy(tiny, 7)), 10)
    assert engine.version == 10


def test_merged_weights_do_not_pass_for_adapters(engine, tiny):
    with pytest.raises(RefreshError) as caught:
        engine.refresh(plain_weights(policy(tiny, 8)), 11)
    assert len(caught.value.problems["not delivered"]) == len(dict(adapter_weights(policy(tiny, 8))))


def test_a_layer_that_holds_something_else_is_found(tiny, monkeypatch):
    engine = build("vllm", tiny)
    compare = adapter_proof.compare_adapter

    def meddled(runner, folder):
        modules = runner.lora_manager._adapter_manager.modules
        modules["model.layers.1.self_attn.qkv_proj"].lora_b_stacked[2][0, 0, 5, 1] += 1  # one element of v's B
        modules["model.layers.0.self_attn.qkv_proj"].lora_b_stacked[1][0, 0, 0, 0] = 1  # k has no adapter
        return compare(runner, folder)

    monkeypatch.setattr("tulu_lightning.rollout.vllm_worker.compare_adapter", meddled)
    with pytest.raises(RefreshError) as caught:
        engine.refresh(adapter_weights(policy(tiny, 9)), 1)
    (names,) = caught.value.problems.values()
    assert set(names) == {NAME, "model.layers.0.self_attn.k_proj.lora_B.weight"}
    engine.close()


def test_in_bfloat16_too(tiny):
    engine, model = build("vllm", tiny, dtype="bfloat16"), policy(tiny, 10)
    engine.refresh(adapter_weights(model), 1)
    completion = engine.generate([PROMPT], 1, Sampling(8), 3)[0][0]
    assert (completion.logprobs_L - scores(model, PROMPT, completion.ids_L.tolist())).abs().mean() < 0.1
    engine.close()
