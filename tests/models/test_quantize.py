"""A base in 4 bits: bitsandbytes' numbers, gradients of the matrix that the codes stand for, and everybody else's names."""

import itertools

import pytest
import torch
from packaging.version import Version
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from tulu_lightning.core.packing import pack as pack_documents
from tulu_lightning.errors import InputError
from tulu_lightning.models import quantize as quantize_module
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.models.heads import PackedReward, PackedValue
from tulu_lightning.models.lora import Lora, start_adapters, without_adapters
from tulu_lightning.models.quantize import Linear4bit, Quantize, pack
from tulu_lightning.models.sharding import INTEGERS, shard
from tulu_lightning.models.weights import plain_weights
from tulu_lightning.rollout.local import LocalEngine

LORA = Lora(r=4, alpha=8)
functional = pytest.importorskip("bitsandbytes.functional")


def moved(model):
    """The model after what training does to B."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def qlora(tiny, compute="float32", **settings):
    return moved(PackedLM(Backbone(tiny, compute, lora=LORA, quantize=Quantize(**settings)), tiny))


def dequantised(model, tiny, compute="float32"):
    """Ordinary LoRA with the same adapters, over the matrices that the codes stand for."""
    plain = PackedLM(Backbone(tiny, compute, lora=LORA), tiny)
    with torch.no_grad():
        for (name, part), (_, other) in zip(model.named_modules(), plain.named_modules(), strict=True):
            if isinstance(part, Linear4bit):
                other.weight.copy_(part.matrix(torch.float32))
            elif ".lora_" in name and isinstance(part, nn.Linear):
                other.weight.copy_(part.weight)
    return plain


def same_bytes(one, other):
    """Codes in a bfloat16's clothes may look like NaN."""
    return torch.equal(one.detach().contiguous().view(torch.uint8), other.detach().contiguous().view(torch.uint8))


@pytest.fixture
def packed(documents):
    return pack_documents(documents(256))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_matrix_is_bitsandbytes_own_in_every_layout(kind):
    weight = torch.randn(48, 192, generator=torch.Generator().manual_seed(0))
    layouts = itertools.product((32, 64, 128), (True, False), ("uint8", "bfloat16"))
    for blocksize, double_quant, storage in layouts:
        settings = Quantize(kind, blocksize, double_quant, storage)
        linear = nn.Linear(192, 48, bias=False)
        linear.weight = nn.Parameter(weight)
        layer = Linear4bit(linear, settings)
        codes, state = functional.quantize_4bit(
            weight, blocksize=blocksize, compress_statistics=double_quant, quant_type=kind
        )
        state.shape = torch.Size((48 * 192,))  # its own kernel reads a matrix wrongly where blocks cross rows
        for dtype in (torch.float32, torch.bfloat16):
            state.dtype = dtype
            assert torch.equal(layer.matrix(dtype), functional.dequantize_4bit(codes, state).view(48, 192)), settings
        error = (layer.matrix(torch.float32) - weight).norm() / weight.norm()
        assert 0.05 < error < 0.14, settings
        on_meta = Linear4bit(nn.Linear(192, 48, bias=False, device="meta"), settings)
        described = [
            {name: (t.shape, t.dtype, t.requires_grad) for name, t in (*x.named_parameters(), *x.named_buffers())}
            for x in (layer, on_meta)
        ]
        assert described[0] == described[1]
        on_meta.to_empty(device="cpu").take(weight)
        assert torch.equal(on_meta.matrix(torch.float32), layer.matrix(torch.float32))


@pytest.mark.parametrize(("compute", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_gradients_are_those_of_lora_over_the_dequantised_matrices(tiny, packed, compute, tolerance):
    model = qlora(tiny, compute)
    other = dequantised(model, tiny, compute)
    found, expected = model(packed).logp_N, other(packed).logp_N
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(found, expected, atol=20 * tolerance, rtol=tolerance)
    gradients = {name: parameter.grad for name, parameter in other.named_parameters()}
    trained = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4 * 7 * 2
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    for name, gradient in trained:
        assert (gradient - gradients[name]).norm() <= tolerance * gradients[name].norm(), name


def test_neither_layout_nor_recomputation_changes_a_bit(tiny, packed):
    def gradients(model):
        model(packed).logp_N.sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    expected = gradients(qlora(tiny))
    for settings in ({"activation_checkpointing": True}, {"recompute_mlps": True}):
        backbone = Backbone(tiny, lora=LORA, quantize=Quantize(), **settings)
        assert all(map(torch.equal, gradients(moved(PackedLM(backbone, tiny))), expected)), settings
    assert all(map(torch.equal, gradients(qlora(tiny, storage="bfloat16")), expected))


def test_evaluation_and_moves_leave_the_codes_alone(tiny, packed):
    """bitsandbytes' own layer repacks them on some CPUs when not training, and casts of a module reach its scales."""
    model = qlora(tiny)
    expected = model(packed).logp_N
    with torch.no_grad():
        assert torch.equal(model.eval()(packed).logp_N, expected)
    layer = next(part for part in model.modules() if isinstance(part, Linear4bit))
    before = layer.matrix(torch.float32)
    assert torch.equal(layer.to(torch.bfloat16).to(torch.float32).matrix(torch.float32), before)


def test_without_adapters_it_is_the_quantised_base(tiny, packed):
    model = qlora(tiny)
    with without_adapters(model), torch.no_grad():
        base = model(packed).logp_N
    start = PackedLM(Backbone(tiny, lora=LORA, quantize=Quantize()), tiny)  # B is 0
    assert torch.equal(base, start(packed).logp_N)
    assert (base - PackedLM(Backbone(tiny), tiny)(packed).logp_N).abs().max() > 1e-3, "4 bits are not the start itself"


def test_everybody_else_sees_dequantised_and_merged_matrices(tiny, packed):
    model = qlora(tiny)
    plain, merged = dict(plain_weights(model.lm)), dict(plain_weights(dequantised(model, tiny).lm))
    ordinary = PackedLM(Backbone(tiny), tiny).lm.state_dict()
    assert list(plain) == list(ordinary)
    assert all(plain[name].shape == ordinary[name].shape and plain[name].dtype == torch.float32 for name in ordinary)
    assert all(torch.equal(plain[name], merged[name]) for name in ordinary)
    engine = LocalEngine.from_model(model.lm)
    assert engine.dtype == torch.float32
    by_hand = PackedLM(Backbone(tiny), tiny)
    by_hand.lm.load_state_dict(plain)
    assert engine.fingerprint() == LocalEngine.from_model(by_hand.lm).fingerprint()
    torch.testing.assert_close(by_hand(packed).logp_N, model(packed).logp_N, atol=1e-5, rtol=1e-5)


def test_matrices_without_adapters_are_quantised_and_read_too(tiny):
    lora = Lora(r=4, targets=["q_proj"])
    model = PackedLM(Backbone(tiny, lora=lora, quantize=Quantize()), tiny)
    assert sum(isinstance(part, Linear4bit) for part in model.modules()) == 4 * 7
    assert list(dict(plain_weights(model.lm))) == list(PackedLM(Backbone(tiny), tiny).lm.state_dict())


@pytest.mark.parametrize("kind", [PackedLM, PackedReward, PackedValue])
def test_a_state_dict_holds_what_trains_and_loads_over_the_same_base(tiny, packed, kind):
    backbone = Backbone(tiny, lora=LORA, quantize=Quantize(), layers=2)
    model = moved(kind(backbone, tiny))
    state = model.state_dict()
    heads = {name for name in state if ".lora_" not in name}
    assert heads == ({"lm.score.weight"} if kind is PackedReward else {"head.weight"} if kind is PackedValue else set())
    assert len(state) - len(heads) == 2 * 7 * 2
    other = kind(backbone, tiny)
    other.load_state_dict(state)
    for one, same in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bytes(one, same)
    name = next(iter(state))
    del state[name]
    with pytest.raises(RuntimeError, match=name):
        other.load_state_dict(state)


def test_only_the_decoders_matrices_are_quantised_and_low_storage_reaches_the_rest(tiny):
    model = PackedLM(Backbone(tiny, "bfloat16", "bfloat16", lora=LORA, quantize=Quantize()), tiny)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for name, dtype in dtypes.items():
        codes = ".base_layer." in name
        assert dtype == (torch.uint8 if codes else torch.float32 if ".lora_" in name else torch.bfloat16), name
    assert sum(dtype == torch.uint8 for dtype in dtypes.values()) == 4 * 7 * 2


LAYOUTS = [{"storage": "uint8"}, {"storage": "bfloat16"}, {"double_quant": False, "blocksize": 128}]


@pytest.mark.skipif(Version(torch.__version__) < INTEGERS, reason="torch shards no integers")
@pytest.mark.parametrize("settings", LAYOUTS, ids=["uint8", "bfloat16", "fp32 scales"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_it_shards_and_is_filled_and_read_from_shards(tiny, packed, tmp_path, settings, compute):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        name = "float32" if compute == torch.float32 else "bfloat16"
        model = qlora(tiny, name, **settings)
        expected, merged = model(packed).logp_N, dict(plain_weights(model.lm))
        sharded = shard(model, init_device_mesh("cpu", (1,)), compute)
        tolerance = (
            0.0 if compute == torch.float32 else 0.05
        )  # FSDP2 keeps the residual stream in bf16, autocast does not
        torch.testing.assert_close(sharded(packed).logp_N, expected, atol=10 * tolerance, rtol=tolerance)
        sharded(packed).logp_N.sum().backward()
        for key, tensor in plain_weights(sharded.lm):
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            assert torch.equal(whole, merged[key]), key
        weights = PackedLM(Backbone(tiny), tiny).lm.state_dict()
        for key, part in sharded.lm.named_modules():
            if isinstance(part, Linear4bit):
                part.weight.to_local().zero_()
                part.take(weights[key.removesuffix(".base_layer") + ".weight"])
        start_adapters(sharded.lm.get_decoder(), LORA)
        fresh = PackedLM(Backbone(tiny, name, lora=LORA, quantize=Quantize(**settings)), tiny)
        for one, same in zip(sharded.parameters(), fresh.parameters(), strict=True):
            assert same_bytes(one.full_tensor(), same)
    finally:
        distributed.destroy_process_group()


def test_the_real_models_decoder_takes_half_a_byte_a_weight(smol):
    model = PackedLM(Backbone(smol, lora=Lora(r=1), quantize=Quantize()), smol)
    layers = [part for part in model.modules() if isinstance(part, Linear4bit)]
    held = sum(t.nbytes for part in layers for t in (part.weight, part.scale, part.nested))
    assert len(layers) == 30 * 7
    assert held / sum(part.in_features * part.out_features for part in layers) == pytest.approx(0.516, abs=0.002)


def test_what_cannot_be_is_refused_by_name(tiny, monkeypatch):
    with pytest.raises(InputError, match=r"^backbone\.quantize: is set without lora"):
        Backbone(tiny, quantize=Quantize())
    for bad in ({"kind": "int4"}, {"blocksize": 48}, {"storage": "float32"}):
        with pytest.raises(InputError, match=rf"quantize\.{next(iter(bad))}"):
            Quantize(**bad)
    monkeypatch.setattr(quantize_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs bitsandbytes.*pip install 'tulu-lightning\[qlora\]'"):
        PackedLM(Backbone(tiny, lora=LORA, quantize=Quantize()), tiny)


def test_rows_that_do_not_pack_are_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"down": nn.Linear(6, 8)})

        def get_decoder(self):
            return self.inner

    with pytest.raises(InputError, match=r"down has rows of 6 numbers, and bfloat16 packs 4 together"):
        quantize_module.quantize(Odd(), Quantize(storage="bfloat16"), "odd")
    model = Odd()
    weight = model.inner["down"].weight.detach().clone()
    quantize_module.quantize(model, Quantize(), "odd")
    layer = model.inner["down"]
    assert pack(weight, Quantize()).scale.shape == (1, 1), "a block crosses rows"
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), x @ layer.matrix(torch.float32).T + layer.bias)
