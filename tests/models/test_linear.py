import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tulu_lightning.models import linear
from tulu_lightning.models.attention import NAME, layout
from tulu_lightning.models.linear import use_fast_layers
from tulu_lightning.types import Span

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.tensor([[3, 14, 15, 9, 2, 6]])


def loss_and_gradients(lm, autocast=False):
    lm.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = lm(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in lm.named_parameters()}


@pytest.fixture(params=["llama", "qwen3"])
def pair(request):
    """A model and its copy with the fast layers."""
    torch.manual_seed(0)
    if request.param == "llama":
        plain = LlamaForCausalLM(LlamaConfig(**SHAPE))
    else:
        plain = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8))
    return plain, use_fast_layers(copy.deepcopy(plain))


def test_loss_and_every_gradient_are_transformers_own(pair):
    (loss, grads), (fast_loss, fast) = map(loss_and_gradients, pair)
    torch.testing.assert_close(fast_loss, loss, rtol=1e-6, atol=0)
    assert fast.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(fast[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()), msg=name)


def test_under_bf16_autocast_they_are_as_near_to_fp32_as_transformers_own(pair):
    exact, reference = loss_and_gradients(pair[0])
    (loss, grads), (fast_loss, fast) = (loss_and_gradients(lm, autocast=True) for lm in pair)
    assert abs(fast_loss - exact) <= 2 * abs(loss - exact) + 1e-3

    def off(found):
        square = sum(float((found[name] - grad).square().sum()) for name, grad in reference.items())
        return (square / sum(float(grad.square().sum()) for grad in reference.values())) ** 0.5

    assert off(fast) < 1.2 * off(grads)


def test_parameters_keep_their_names_and_a_saved_model_is_the_same(pair, tmp_path):
    plain, fast = pair
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in fast.named_parameters()]
    fast.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), again.parameters(), strict=True))


def test_the_low_copy_follows_every_kind_of_change_of_its_weight():
    layer = use_fast_layers(torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False)))[0]

    def follows():
        return torch.equal(layer.low(torch.bfloat16), layer.weight.bfloat16())

    assert follows()
    layer.weight.grad = torch.ones(3, 4)
    torch.optim.AdamW([layer.weight], lr=0.5, fused=True).step()
    assert follows(), "fused optimisers do not raise the weight's version"
    layer.load_state_dict({"weight": torch.full((3, 4), 7.0)})
    assert follows()
    assert list(layer.state_dict()) == ["weight"]


def test_a_layer_that_something_else_has_taken_the_place_of_goes_the_usual_way(pair):
    plain, fast = pair
    for lm in pair:
        mlp = lm.model.layers[0].mlp
        mlp.up_proj = torch.nn.Sequential(mlp.up_proj)
    torch.testing.assert_close(fast(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def packed_loss(lm, autocast=False):
    """Two documents in one pack."""
    lm.zero_grad()
    lm.set_attn_implementation(NAME)
    segments, positions = layout([Span(0, 4, -1), Span(4, 6, -1)]), torch.tensor([[0, 1, 2, 3, 0, 1]])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = lm(input_ids=IDS, position_ids=positions, labels=IDS, use_cache=False, segments=segments).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in lm.named_parameters()}


KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "llama with biases": (LlamaForCausalLM, LlamaConfig(**SHAPE, attention_bias=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=8)),
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=4)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_loss_and_gradients_are_those_of_transformers_layers(kind, monkeypatch):
    """With the rotary embedding of ours in between, where the layer is known."""
    calls = []
    monkeypatch.setattr(linear, "rotary", lambda *args, own=linear.rotary: calls.append(1) or own(*args))
    torch.manual_seed(0)
    model, config = KINDS[kind]
    plain = model(config)
    for name, parameter in plain.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    fast = use_fast_layers(copy.deepcopy(plain))
    (loss, grads), (fast_loss, found) = packed_loss(plain), packed_loss(fast)
    torch.testing.assert_close(fast_loss, loss, rtol=1e-6, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()), msg=name)
    assert len(calls) == (0 if kind == "mistral" else 4), "queries and keys of two layers"
