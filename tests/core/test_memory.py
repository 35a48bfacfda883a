"""Memory of a training step from shapes: against counts of the paper's models, and against what layers really keep."""

import gc
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tulu_lightning.core.memory import (
    Architecture,
    Network,
    Pass,
    activation_bytes,
    cache_bytes,
    gathered_bytes,
    network_bytes,
    pass_bytes,
)
from tulu_lightning.core.packing import pack
from tulu_lightning.models.architectures import KNOWN
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.models.lora import Lora
from tulu_lightning.types import Document, Segment

LLAMA = KNOWN
SMALL = Architecture(width=64, mlp=160, layers=3, query=64, kv=32, vocabulary=300, tied=False)


def test_parameters_of_llama():
    assert LLAMA["8B"].parameters == 8_030_261_248
    assert LLAMA["70B"].parameters == 70_553_706_496
    assert LLAMA["405B"].parameters == 405_853_388_800


def test_parameters_equal_those_of_transformers():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, tie_word_embeddings=False,
    )  # fmt: skip
    for tied in (False, True):
        config.tie_word_embeddings = tied
        model = AutoModelForCausalLM.from_config(config)
        assert SMALL._replace(tied=tied).parameters == sum(p.numel() for p in model.parameters())


def test_sixteen_bytes_a_parameter_and_what_changes_that():
    eight = Network(LLAMA["8B"])
    assert sum(network_bytes(eight).values()) == 16 * 8_030_261_248
    assert sum(network_bytes(eight, shards=32).values()) == 16 * 8_030_261_248 / 32
    # bf16 weights and gradients, two moments in 8 bits with an fp32 scale for each 256: 2 + 2 + 2 (1 + 4/256).
    low = network_bytes(eight._replace(weight_bytes=2, state_bits=8))
    assert sum(low.values()) == pytest.approx((4 + 2 * (1 + 4 / 256)) * 8_030_261_248)
    # With 32 bits torch's two moments have the weights' own dtype: 2 + 2 + 2 x 2.
    assert sum(network_bytes(eight._replace(weight_bytes=2)).values()) == 8 * 8_030_261_248
    assert network_bytes(eight._replace(trained=False)) == {
        "weights": 4 * 8_030_261_248, "gradients": 0, "optimizer": 0,
    }  # fmt: skip


def test_adapters_and_four_bits():
    # One layer of 8B, r = 1: q and o 4096 + 4096, k and v 4096 + 1024, gate, up and down 4096 + 14336 each.
    a_layer = 2 * 8192 + 2 * 5120 + 3 * 18432
    assert LLAMA["8B"].adapters(16) == 32 * 16 * a_layer == 41_943_040
    # On q and v alone: 8192 and 5120 a layer.
    few = Network(LLAMA["8B"], lora=16, targets=("q_proj", "v_proj"))
    assert few.trainable == LLAMA["8B"].adapters(16, few.targets) == 32 * 16 * (8192 + 5120) == 6_815_744
    assert network_bytes(few)["weights"] == 4 * (8_030_261_248 + 6_815_744)
    parts = network_bytes(Network(LLAMA["8B"], lora=16, four_bits=0.5, weight_bytes=2))
    quantised = 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336)
    assert parts["weights"] == (8_030_261_248 - quantised) * 2 + quantised * 0.5 + 41_943_040 * 4
    assert parts["gradients"] == 41_943_040 * 4
    assert parts["optimizer"] == 41_943_040 * 8


def test_a_cache_of_one_token_of_8b_is_128_kib():
    assert cache_bytes(LLAMA["8B"], tokens=1) == 2 * 32 * 1024 * 2 == 131_072


def test_what_recomputation_and_splits_leave():
    this = Pass(4096, 4096, compute_bytes=2, device="cuda")
    network = Network(LLAMA["8B"])
    whole, mlps, layers = (
        activation_bytes(network, this._replace(recompute=kind)) for kind in ("none", "mlps", "layers")
    )
    assert layers < 0.3 * whole
    assert layers < mlps < whole
    assert activation_bytes(network, this._replace(tensor_parallel=8)) < whole
    # With a stream of 2 bytes, recomputing layers keeps 2 x width a layer and token, and the rest once.
    low = activation_bytes(network, this._replace(recompute="layers", residual_bytes=2))
    assert low == layers - 4096 * 4096 * 2 * (32 + 1 + 2)
    twice = gathered_bytes(network, 2) - gathered_bytes(network, 2, tensor_parallel=2)
    assert twice == (2 * 2 + 4) * LLAMA["8B"].layer_matrices / 2, "only the layers are split"


def test_the_loss_holds_a_chunk_of_logits_and_the_heads_gradient():
    few = Pass(1000, 10)
    assert pass_bytes(Network(SMALL), few)["loss"] == 2 * 10 * 300 * 4 + 300 * 64 * 4
    assert pass_bytes(Network(SMALL, lora=4), few)["loss"] == 2 * 10 * 300 * 4
    assert pass_bytes(Network(SMALL), few._replace(in_place=True))["loss"] == 2 * 10 * 300 * 4
    stored_low = Network(SMALL, weight_bytes=2)
    assert pass_bytes(stored_low, few._replace(in_place=True))["loss"] == 2 * 10 * 300 * 4 + 300 * 64 * 4
    many = Pass(100_000, 100_000)
    assert pass_bytes(Network(SMALL), many)["loss"] == 2 * (64 << 20) + 300 * 64 * 4
    assert "loss" not in pass_bytes(Network(SMALL, scalar_head=True), many)


# Against what is kept -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, tie_word_embeddings=False, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    made = tmp_path_factory.mktemp("small")
    AutoModelForCausalLM.from_config(config).save_pretrained(made)
    return str(made)


def kept(model, tokens):
    """Bytes of distinct storages that one forward keeps for its backward, without the weights."""
    ids = torch.arange(tokens) % 300
    document = Document((Segment(ids, torch.ones(tokens)),))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def hold(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        stats = model(pack([document]), weight_N=torch.ones(tokens - 1))
    for gradient in stats.nll.grad_fn.grads:  # made in forward and given away by backward, so no hook sees them
        if gradient is not None:
            hold(gradient)
    total = sum(size for size, _ in found.values())
    del stats, gradient
    gc.collect()
    return total


@pytest.mark.parametrize(
    ("settings", "network", "change"),
    [
        ({}, {}, {}),
        ({"compute_dtype": "bfloat16"}, {}, {"compute_bytes": 2}),
        ({"recompute_mlps": True}, {}, {"recompute": "mlps"}),
        ({"activation_checkpointing": True}, {}, {"recompute": "layers"}),
        ({"lora": Lora(r=4)}, {"lora": 4}, {}),
        ({"lora": Lora(r=4, targets=["q_proj", "v_proj"])}, {"lora": 4, "targets": ("q_proj", "v_proj")}, {}),
    ],
)
def test_what_a_layer_keeps_is_what_is_counted(folder, settings, network, change):
    """Between two lengths, so that nothing of fixed size counts; within 12 %, or the formula has lost a tensor."""
    model = PackedLM(replace(Backbone(folder), **settings), folder).train()
    kept(model, 8)  # the first pass tries kernels, which keeps what they are tried on
    measured = (kept(model, 512) - kept(model, 256)) / 256

    def counted(tokens):
        this = Pass(tokens, tokens, **change)
        # What only backward adds, and the layer that is computed again, are not kept by forward.
        return activation_bytes(Network(SMALL, **network), this) - once(this)

    def once(this):
        backward = this.tokens * (3 * SMALL.mlp + 2 * SMALL.width) * this.compute_bytes
        again = {"mlps": 2 * SMALL.mlp * 4, "layers": (4 * 64 + 2 * 64 + 2 * 32 + 2 * SMALL.mlp) * 4 + 8, "none": 0}
        return backward + this.tokens * again[this.recompute]

    assert (counted(512) - counted(256)) / 256 == pytest.approx(measured, rel=0.12)
