"""Adapters for vLLM, as far as they can be followed without it: what is written, what is refused, what a proof finds."""

from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tulu_lightning.errors import InputError
from tulu_lightning.models.lora import Lora, adapt, adapter_weights
from tulu_lightning.rollout.adapter_proof import compare_adapter
from tulu_lightning.rollout.adapters import adapter_folder, adapter_options, new_name, room_for
from tulu_lightning.rollout.delivery import Delivery, contents_of
from tulu_lightning.rollout.engine import RefreshError
from tulu_lightning.rollout.engines import EngineSettings, check_push
from tulu_lightning.rollout.fingerprint import mark

LORA = Lora(r=4, alpha=12, targets=["q_proj", "down_proj"], rslora=True)  # a scale of 12 / √4 = 6
A, B = "model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture
def policy(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    adapt(model, LORA, str(tiny))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def test_the_folder_is_one_that_peft_reads(tiny, policy):
    ids = torch.arange(40)[None]
    with adapter_folder(adapter_weights(policy), LORA) as folder, torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
        alone = base(ids).logits
        loaded = peft.PeftModel.from_pretrained(base, folder).eval()
        assert torch.allclose(loaded(ids).logits, policy(ids).logits, atol=1e-5)
        assert (alone - policy(ids).logits).abs().max() > 0.1
    assert not Path(folder).exists()


def test_what_has_to_arrive_is_known_before_there_are_weights(tiny, policy):
    contents = contents_of(tiny, LORA)
    assert contents.shapes == {name: tuple(x.shape) for name, x in adapter_weights(policy)}
    assert adapter_options(LORA, contents)["lora_target_modules"] == ["down_proj", "q_proj"]
    sent = dict(Delivery(contents, torch.float32, adapter_weights(policy)).complete())
    assert sent.keys() == contents.shapes.keys()
    named = [(name, x) for name, x in adapter_weights(policy) if name != B]
    with pytest.raises(RefreshError) as caught:
        Delivery(contents, torch.float32, named).complete()
    assert caught.value.problems == {"not delivered": (B,)}


@pytest.mark.parametrize(("r", "room"), [(1, 1), (2, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_room_is_the_smallest_that_vllm_has(r, room):
    assert room_for(r) == room


def test_names_do_not_come_again():
    assert len({new_name(3) for _ in range(50)}) == 50


class Layer:
    """One of vLLM's layers with room for rank 8 in two slots, of which the second is taken."""

    def __init__(self, inputs, outputs, tp_size=1):
        self.lora_a_stacked = tuple(torch.zeros(2, 1, 8, inputs) for _ in outputs)
        self.lora_b_stacked = tuple(torch.zeros(2, 1, size, 8) for size in outputs)
        self.tp_size = tp_size


@pytest.fixture
def held(policy):
    """A runner whose layers hold what the policy's adapters are."""
    modules = {}
    for i, layer in enumerate(policy.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        sizes = [part.out_features for part in (attention.q_proj.base_layer, attention.k_proj, attention.v_proj)]
        qkv = modules[f"model.layers.{i}.self_attn.qkv_proj"] = Layer(policy.config.hidden_size, sizes)
        down = modules[f"model.layers.{i}.mlp.down_proj"] = Layer(
            mlp.down_proj.in_features, [policy.config.hidden_size]
        )
        for room, part in ((qkv, attention.q_proj), (down, mlp.down_proj)):
            a, b = part.lora_A["default"].weight.detach(), part.lora_B["default"].weight.detach()
            room.lora_a_stacked[0][1, 0, :4] = a
            room.lora_b_stacked[0][1, 0, :, :4] = 6 * b
    manager = SimpleNamespace(modules=modules, lora_index_to_id=[None, 7])
    model = SimpleNamespace(packed_modules_mapping={"qkv_proj": ["q_proj", "k_proj", "v_proj"]})
    return SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager), get_model=lambda: model)


def compared(runner, policy):
    with adapter_folder(adapter_weights(policy), LORA) as folder:
        return compare_adapter(runner, Path(folder))


def test_layers_that_hold_it_all_are_told_from_layers_that_do_not(held, policy):
    modules = held.lora_manager._adapter_manager.modules
    report = compared(held, policy)
    assert report["received"] == {name: mark(x) for name, x in adapter_weights(policy)}
    assert report["differ"] == report["unproved"] == []
    qkv = modules["model.layers.0.self_attn.qkv_proj"]
    qkv.lora_b_stacked[0][1, 0, 3, 2] += 1e-3  # one element
    qkv.lora_a_stacked[1][1, 0, 0, 0] = 1e-3  # keys have no adapter
    qkv.lora_b_stacked[2][0, 0, 0, 0] = 5.0  # another slot, which nobody samples with
    modules["model.layers.1.mlp.down_proj"].lora_a_stacked[0][1, 0, 6, 0] = 1e-3  # past its rank
    assert set(compared(held, policy)["differ"]) == {
        B,
        "model.layers.0.self_attn.k_proj.lora_A.weight",
        "model.layers.1.mlp.down_proj.lora_A.weight",
    }


def test_a_layer_without_room_or_an_adapter_that_was_not_loaded_is_found(held, policy):
    manager = held.lora_manager._adapter_manager
    manager.modules.pop("model.layers.0.self_attn.qkv_proj")
    assert set(compared(held, policy)["differ"]) == {A, B}
    manager.lora_index_to_id = [None, None]
    assert set(compared(held, policy)["differ"]) >= {name for name, _ in adapter_weights(policy)}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_answers_for_its_share(held, policy, rank):
    """Of outputs that are cut a worker has rows of B, of inputs columns of A."""
    modules = held.lora_manager._adapter_manager.modules
    qkv, down = modules["model.layers.0.self_attn.qkv_proj"], modules["model.layers.0.mlp.down_proj"]
    for module in (qkv, down):
        module.base_layer = SimpleNamespace(tp_size=2, tp_rank=rank)
    half = lambda room, axis: room.chunk(2, axis)[rank].clone()  # noqa: E731
    qkv.lora_b_stacked = tuple(half(room, 2) for room in qkv.lora_b_stacked)
    down.lora_a_stacked = tuple(half(room, 3) for room in down.lora_a_stacked)
    assert compared(held, policy)["differ"] == []
    qkv.lora_b_stacked[0][1, 0, 0, 0] += 1
    down.lora_a_stacked[0][1, 0, 0, 0] += 1
    assert set(compared(held, policy)["differ"]) == {B, "model.layers.0.mlp.down_proj.lora_A.weight"}


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"push": "adapters"}, "rollout.engine.push: is 'adapters'"),
        ({"kind": "local", "push": "adapter"}, "rollout.engine.push"),
        (
            {"kind": "server", "url": "http://a:1", "broadcast_workers": 2, "push": "adapter"},
            "adapter, and broadcasts carry merged weights",
        ),
    ],
)
def test_settings_that_clash_are_refused(settings, what):
    with pytest.raises(InputError, match=what):
        EngineSettings(**settings)


@pytest.mark.parametrize(
    ("lora", "in_4_bits", "what"),
    [
        (None, False, "rollout.engine.push: is adapter, and the policy has none: backbone.lora is not set"),
        (LORA, True, "base is in 4 bits"),
        (Lora(r=513), False, "lora.r: is 513, and vLLM has room for adapters of rank 512 at most"),
    ],
)
def test_policies_that_cannot_push_adapters_are_refused(lora, in_4_bits, what):
    check_push(EngineSettings("server"), lora, in_4_bits)  # merged ones always can
    check_push(EngineSettings("server", push="adapter"), LORA, False)
    with pytest.raises(InputError, match=what):
        check_push(EngineSettings("server", push="adapter"), lora, in_4_bits)
