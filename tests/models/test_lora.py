"""Adapters: the model starts as it was, only they train, and everybody else sees merged weights."""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from tulu_lightning.core.packing import pack
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.models.heads import PackedValue
from tulu_lightning.models.lora import Lora, without_adapters
from tulu_lightning.models.sharding import shard
from tulu_lightning.models.weights import plain_weights
from tulu_lightning.rollout.local import LocalEngine


def moved(model):
    """The model after what training does to B."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def packed(documents):
    return pack(documents(256))


def test_it_starts_as_the_base_bit_for_bit_and_leaves_random_state_alone(tiny, packed):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = PackedLM(Backbone(tiny, lora=Lora()), tiny)
    assert torch.equal(torch.get_rng_state(), before)
    base = PackedLM(Backbone(tiny), tiny)
    assert torch.equal(model(packed).logp_N, base(packed).logp_N)
    again = PackedLM(Backbone(tiny, lora=Lora()), tiny)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other = PackedLM(Backbone(tiny, lora=Lora(seed=1)), tiny)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_every_linear_layer_of_the_decoder_gets_a_pair_and_nothing_else_trains(tiny, packed):
    model = PackedLM(Backbone(tiny, lora=Lora(r=4)), tiny)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 4 * 7 * 2, "4 layers of 7 matrices"
    assert all(".lora_" in name for name in trained)
    model(packed).logp_N.sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_the_function_is_w_plus_scaled_b_a(tiny, packed, rslora, scale):
    lora = Lora(r=4, alpha=8, targets=["q_proj", "down_proj"], rslora=rslora)
    model = moved(PackedLM(Backbone(tiny, lora=lora), tiny))
    state = model.lm.state_dict()
    by_hand = PackedLM(Backbone(tiny), tiny)
    adapted = 0
    with torch.no_grad():
        for name, weight in by_hand.lm.named_parameters():
            stem = name.removesuffix(".weight")
            if f"{stem}.lora_A.default.weight" in state:
                weight += scale * state[f"{stem}.lora_B.default.weight"] @ state[f"{stem}.lora_A.default.weight"]
                adapted += 1
    assert adapted == 4 * 2
    torch.testing.assert_close(model(packed).logp_N, by_hand(packed).logp_N, atol=1e-5, rtol=1e-5)
    plain, expected = dict(plain_weights(model.lm)), by_hand.lm.state_dict()
    assert plain.keys() == expected.keys()
    assert all(torch.allclose(plain[name], expected[name], atol=1e-6) for name in expected)


def test_without_adapters_it_is_the_base_and_then_itself_again(tiny, packed):
    model = moved(PackedLM(Backbone(tiny, lora=Lora()), tiny))
    own = model(packed).logp_N
    with without_adapters(model), torch.no_grad():
        base = model(packed).logp_N
    assert torch.equal(base, PackedLM(Backbone(tiny), tiny)(packed).logp_N)
    assert torch.equal(model(packed).logp_N, own)
    assert not torch.allclose(own, base, atol=1e-3)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 4 * 7 * 2


def test_an_engine_samples_from_the_merged_weights(tiny, packed):
    model = moved(PackedLM(Backbone(tiny, lora=Lora()), tiny))
    engine = LocalEngine.from_model(model.lm)
    loaded = AutoModelForCausalLM.from_pretrained(tiny)
    loaded.load_state_dict(dict(plain_weights(model.lm)))
    assert engine.fingerprint() == LocalEngine.from_model(loaded).fingerprint()


def test_over_a_bf16_base_adapters_are_fp32(tiny):
    model = PackedLM(Backbone(tiny, "bfloat16", weights_dtype="bfloat16", lora=Lora()), tiny)
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_a_critics_head_trains_beside_its_adapters(tiny, packed):
    critic = PackedValue(Backbone(tiny, lora=Lora(), layers=2), tiny)
    critic(packed).sum().backward()
    trained = {name for name, parameter in critic.named_parameters() if parameter.grad is not None}
    assert "head.weight" in trained
    assert len(trained) == 1 + 2 * 7 * 2


def test_it_shards_and_merges_from_shards(tiny, packed, tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = moved(PackedLM(Backbone(tiny, lora=Lora()), tiny))
        expected, merged = model(packed).logp_N, dict(plain_weights(model.lm))
        sharded = shard(model, init_device_mesh("cpu", (1,)))
        assert torch.equal(sharded(packed).logp_N, expected)
        for name, tensor in plain_weights(sharded.lm):
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            assert torch.equal(whole, merged[name]), name
    finally:
        distributed.destroy_process_group()


def test_a_target_that_is_not_there_is_refused_with_those_that_are(tiny):
    with pytest.raises(InputError, match=r"names 'query', .*linear layers are down_proj, gate_proj, k_proj"):
        PackedLM(Backbone(tiny, lora=Lora(targets=["q_proj", "query"])), tiny)
    for bad in ({"r": 0}, {"alpha": 0}, {"targets": []}):
        with pytest.raises(InputError, match=r"lora\."):
            Lora(**bad)
