"""What packed attention cannot compute is refused when a model loads; so are damaged weights and rows beyond the model."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from tulu_lightning.core.packing import pack
from tulu_lightning.errors import InputError
from tulu_lightning.models import attention
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.models.heads import PackedValue
from tulu_lightning.models.limits import check_documents, check_prompts, read_limits
from tulu_lightning.models.sharding import shard
from tulu_lightning.types import Check, Document, Prompt, Segment

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 = GPT2Config(
    vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=1, **NO_DROPOUT
)


def saved(config, folder):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def row(tokens, parent=-1, token=7):
    return Segment(torch.full((tokens,), token), torch.ones(tokens), parent)


# Architectures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MistralConfig(**SHAPE, sliding_window=6), "sliding window of 6"),
        (Gemma2Config(**SHAPE, query_pre_attn_scalar=8), "soft cap"),
        (Gemma2Config(**SHAPE, query_pre_attn_scalar=8, final_logit_softcapping=None), "use softcap"),
        (GptOssConfig(**SHAPE, num_local_experts=4), "use s_aux"),
        (PhiConfig(**{**SHAPE, "num_key_value_heads": 4}), "a bias"),
        (GraniteConfig(**SHAPE, logits_scaling=4.0), "logits are off by 3 of"),
        (CohereConfig(**SHAPE, logit_scale=0.5), "logits are off by 1 of"),
        (MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, initializer_range=0.3), "logits are off by"),
        (GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4), "resid_pdrop is 0.1"),
    ],
    ids=["window", "head cap", "soft cap", "sinks", "bias", "scaling", "scale", "state", "dropout"],
)
def test_what_would_train_on_wrong_numbers_is_refused(config, said, tmp_path):
    folder = saved(config, tmp_path)
    with pytest.raises(InputError, match=said) as error:
        Backbone(folder).load(folder)
    assert error.value.where == folder


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SHAPE), Qwen2Config(**SHAPE), Qwen3Config(**SHAPE), MistralConfig(**SHAPE, sliding_window=32), GPT2],
    ids=["llama", "qwen 2", "qwen 3", "mistral", "gpt 2"],
)
def test_plain_architectures_load_and_are_left_as_they_were(config, tmp_path):
    folder = saved(config, tmp_path)
    state = torch.get_rng_state()
    lm = Backbone(folder).load(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert lm.config._attn_implementation == attention.NAME
    assert lm.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in lm.parameters())


def test_a_window_hides_nothing_from_rows_within_it_and_refuses_longer_ones(tmp_path):
    folder = saved(MistralConfig(**SHAPE, sliding_window=12), tmp_path)
    model = PackedLM(Backbone(folder), folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.randint(0, 60, (12,), generator=torch.Generator().manual_seed(1))
    parts = ids.split([8, 4])
    whole = Document((Segment(parts[0], torch.ones(8)), Segment(parts[1], torch.ones(4), 0)))
    other = Document((row(10),))
    with torch.no_grad():
        found = model(pack([other, whole])).logp_N[9:]
        expected = reference(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="a row of 13 tokens is longer than the model's sliding window of 12"):
        model(pack([Document((row(8), row(5, 0)))]))


def test_layers_that_cannot_be_found_are_said_so(tmp_path):
    folder = saved(GPT2, tmp_path)
    with pytest.raises(InputError, match="does not keep its decoder layers under `layers`"):
        Backbone(folder, layers=1).load(folder)
    with pytest.raises(InputError, match="does not keep its decoder layers under `layers`"):
        shard(PackedLM(Backbone(folder), folder), None)  # type: ignore[arg-type]


# Folders ------------------------------------------------------------------------------------------------------------


def test_truncated_weights_are_bad_input(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="its weights do not load"):
        Backbone(str(folder)).load(str(folder))


def test_a_missing_tensor_is_not_made_up(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 tensors, the first is model\.layers\.1\.mlp\.up_proj\.weight"):
        Backbone(str(folder)).load(str(folder))


# Rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, 264])
def test_a_token_id_outside_the_vocabulary(tiny, token):
    with pytest.raises(InputError, match=f"the token id {token}, and the model .* knows 0 to 263"):
        check_documents([Document((row(3), row(2, 0, token)))], tiny)


def test_the_longest_chain_counts_not_the_row(tiny):
    assert read_limits(tiny).positions == 4096
    check_documents([Document((row(3000), row(1096, 0), row(1096, 0)))], tiny)
    with pytest.raises(InputError, match=r"has 4097 tokens, and the model .* has 4096 positions"):
        check_documents([Document((row(3000), row(1096, 0), row(1097, 0)))], tiny)


def test_a_prompt_counts_with_its_response(tiny):
    prompt = Prompt((7,) * 4090, (Check("last_number", "1"),), "", 0)
    check_prompts([prompt], 6, tiny)
    with pytest.raises(InputError, match="has 4097 tokens with the 7 new ones"):
        check_prompts([prompt], 7, tiny)


def test_a_window_counts_where_some_layer_slides(tmp_path):
    MistralConfig(**SHAPE, sliding_window=12).save_pretrained(tmp_path / "slides")
    Qwen2Config(**SHAPE, sliding_window=12, use_sliding_window=False).save_pretrained(tmp_path / "sees")
    assert read_limits(str(tmp_path / "slides")).window == 12
    assert read_limits(str(tmp_path / "sees")).window is None


# Sharded bf16 -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [PackedLM, PackedValue])
def test_a_sharded_module_is_cast_by_its_policy_alone(kind, tiny, documents, mesh, monkeypatch):
    packed = pack(documents(256)[4:7])
    config = Backbone(tiny, compute_dtype="bfloat16")

    def numbers(wrap):
        module = kind(config, tiny)
        if isinstance(module, PackedValue):
            nn.init.normal_(module.head.weight, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            out = wrap(module)(packed)
        return out.logp_N if kind is PackedLM else out

    alone = numbers(lambda module: module)
    monkeypatch.setattr(Backbone, "autocast", lambda *_: pytest.fail("autocast on top of the sharding's policy"))
    sharded = numbers(lambda module: shard(module, mesh, torch.bfloat16))
    assert sharded.dtype == torch.float32
    assert (sharded - alone).abs().max() < 0.05 * max(1.0, float(alone.abs().max()))
