"""Scalar heads: what they start as, where they read, what goes on from a reward model, and what cannot."""

import shutil

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GptOssConfig, LlamaConfig, PhiConfig

from tulu_lightning.core.packing import pack
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.models.heads import PackedReward, PackedValue, has_reward_head
from tulu_lightning.models.lora import Lora
from tulu_lightning.models.sharding import shard

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def saved(config, folder):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def classifier(source, folder, labels=1, **changes):
    """A sequence classifier of transformers' making, saved with a head that is not small."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=labels, **changes)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{source}/{name}", folder)
    return str(folder)


@pytest.fixture(scope="module")
def reward_folder(tiny, tmp_path_factory):
    return classifier(tiny, tmp_path_factory.mktemp("reward"))


@pytest.fixture
def packed(documents):
    return pack(documents(256))


def alone(reference, documents):
    """What transformers' classifier says of every segment, each with what it follows in a sequence of its own."""
    reference.config.pad_token_id = None  # random rows may end in the padding token; this reads the last one anyway
    rewards = []
    for document in documents:
        for segment in document.segments:
            ids, parent = [segment.ids_L], segment.parent
            while parent >= 0:
                ids.insert(0, document.segments[parent].ids_L)
                parent = document.segments[parent].parent
            rewards.append(reference(torch.cat(ids)[None], use_cache=False).logits[0, 0])
    return torch.stack(rewards)


def same_rewards(folder, documents):
    model = PackedReward(Backbone(folder), folder)
    reference = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        reference.score.weight.copy_(model.head.weight)
        torch.testing.assert_close(model(pack(documents)), alone(reference, documents), atol=1e-5, rtol=1e-5)


def test_packed_with_a_shared_start_rewards_are_those_of_each_chain_alone(tiny, documents):
    same_rewards(tiny, documents(256))


def test_and_so_they_are_on_a_real_llama(smol, documents):
    same_rewards(smol, documents(49152)[4:7])


def test_padding_is_a_segment_of_its_own_and_changes_no_reward(tiny, documents):
    rows, model = documents(256)[4:6], PackedReward(Backbone(tiny), tiny)
    with torch.no_grad():
        plain, padded = model(pack(rows)), model(pack(rows, pad_to=128))
    assert len(padded) == len(plain) + 1 == 7
    torch.testing.assert_close(padded[:6], plain, atol=1e-6, rtol=0)


def test_a_fresh_head_is_the_papers_and_leaves_random_state_alone(tiny, smol):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (PackedReward(Backbone(tiny), tiny, seed).head.weight for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    wide = torch.cat([PackedReward(Backbone(smol, layers=1), smol, seed).head.weight for seed in range(2)])
    for weight, width in ((torch.cat([one, other]), 256), (wide, 576)):
        assert weight.shape == (2, width)
        # The deviation of so many draws is off by 1 in √(4 width), 3 % or 2 %: five of these are allowed.
        assert float(weight.detach().std()) * (width + 1) ** 0.5 == pytest.approx(1, abs=5 / (4 * width) ** 0.5)


def test_the_output_head_is_neither_there_nor_trained(tmp_path, documents):
    folder = saved(LlamaConfig(**SHAPE, tie_word_embeddings=False), tmp_path)
    model = PackedReward(Backbone(folder), folder)
    model(pack(documents(256))).sum().backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert names == {name for name, _ in model.named_parameters()}
    assert {name for name in names if ".layers." not in name} == {
        "lm.model.embed_tokens.weight",
        "lm.model.norm.weight",
        "lm.score.weight",
    }


def test_adapters_train_with_the_head_and_nothing_else(tiny, reward_folder, packed):
    for folder in (tiny, reward_folder):
        model = PackedReward(Backbone(folder, lora=Lora(r=4)), folder)
        model(packed).sum().backward()
        trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert len(trained) == 4 * 7 * 2 + 1
        assert all(".lora_" in name or name == "lm.score.weight" for name in trained)


def test_the_heads_weights_and_arithmetic_stay_fp32(tiny, packed):
    low = PackedReward(Backbone(tiny, "bfloat16", weights_dtype="bfloat16"), tiny)
    dtypes = {name: parameter.dtype for name, parameter in low.named_parameters()}
    assert dtypes.pop("lm.score.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    assert {buffer.dtype for buffer in low.buffers()} == {torch.float32}
    rewards = low(packed)
    assert rewards.dtype == torch.float32
    plain = PackedReward(Backbone(tiny), tiny)(packed)
    assert 0 < (rewards - plain).abs().max() < 0.05 * plain.abs().max(), "bf16 below it, and the same head"


def test_sharded_the_head_still_has_its_digits(tiny, packed, tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = PackedReward(Backbone(tiny, "bfloat16"), tiny)
        expected = model(packed).detach()
        seen = []
        model.head.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, module.weight.dtype)))
        sharded = shard(model, init_device_mesh("cpu", (1,)), torch.bfloat16)
        found = sharded(packed)
        found.sum().backward()
        assert seen == [(torch.float32, torch.float32)]
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()
        assert all(parameter.grad is not None for parameter in sharded.parameters())
    finally:
        distributed.destroy_process_group()


def test_activation_checkpointing_changes_no_gradient(tiny, packed):
    plain, saving = (
        PackedReward(Backbone(tiny, activation_checkpointing=checkpointing), tiny) for checkpointing in (False, True)
    )
    for model in (plain, saving):
        model(packed).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-5, msg=name)


# Going on from a reward model ---------------------------------------------------------------------------------------


def test_a_reward_models_head_goes_on_whatever_the_seed(reward_folder, documents):
    assert has_reward_head(reward_folder)
    same_rewards(reward_folder, documents(256)[4:7])
    weight = AutoModelForSequenceClassification.from_pretrained(reward_folder).score.weight
    assert torch.equal(PackedReward(Backbone(reward_folder), reward_folder, seed=9).head.weight, weight)


def test_a_critic_that_starts_from_it_values_each_state_as_the_reward_model_does(reward_folder, packed, documents):
    value, reward = (kind(Backbone(reward_folder), reward_folder) for kind in (PackedValue, PackedReward))
    # Cut into segments of one token, each token's reward is read; the same tokens follow in the same order.
    pairs = documents(256)[4:6]
    packed = pack(pairs)
    with torch.no_grad():
        hidden_TD = reward.hidden_at(reward.lm.get_decoder(), packed, torch.arange(len(packed.tokens_T)))
        rewards_T = hidden_TD @ reward.head.weight[0]
        values_N = value(packed)
        torch.testing.assert_close(values_N, rewards_T[packed.source_N], atol=1e-5, rtol=1e-5)
        ends = [span.end - 1 for span in packed.spans]
        torch.testing.assert_close(reward(packed), rewards_T[ends], atol=1e-5, rtol=1e-5)
    assert values_N.std() > 0.1, "the head is not the small fresh one"


def test_a_critic_that_starts_from_a_language_model_starts_near_0(tiny, packed):
    assert not has_reward_head(tiny)
    value = PackedValue(Backbone(tiny), tiny)
    assert float(value.head.weight.detach().std()) == pytest.approx(1 / 257, rel=0.25)
    with torch.no_grad():
        assert value(packed).abs().max() < 0.5


@pytest.mark.parametrize("kind", [PackedReward, PackedValue])
def test_several_labels_are_no_reward(kind, tiny, tmp_path):
    folder = classifier(tiny, tmp_path / "two", labels=2)
    with pytest.raises(InputError, match="a classifier with 2 labels, and a reward is one number"):
        kind(Backbone(folder), folder)


@pytest.mark.parametrize("kind", [PackedReward, PackedValue])
def test_a_head_of_another_width_is_refused(kind, reward_folder, tmp_path):
    folder = shutil.copytree(reward_folder, tmp_path / "wide")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"hidden_size": 256', '"hidden_size": 128'))
    with pytest.raises(InputError, match=r"its score\.weight has the shape \[1, 256\], .* the decoder is 128 wide"):
        kind(Backbone(str(folder)), str(folder))


def test_a_head_does_not_read_another_layer_than_its_own(reward_folder):
    with pytest.raises(InputError, match="whose head reads all 4 layers, and layers is 2"):
        PackedValue(Backbone(reward_folder, layers=2), reward_folder)
    assert has_reward_head(reward_folder, layers=4)


def test_a_reward_model_is_no_policy(reward_folder):
    with pytest.raises(InputError, match="it is a reward model or another classifier"):
        PackedLM(Backbone(reward_folder), reward_folder)


def test_an_architecture_whose_hidden_states_are_others_packed_is_refused(tmp_path):
    folder = saved(GptOssConfig(**SHAPE, num_local_experts=4), tmp_path / "sinks")
    with pytest.raises(InputError, match="use s_aux"):
        PackedReward(Backbone(folder), folder)


def test_a_bias_of_the_output_head_does_not_matter(tmp_path, documents):
    folder = saved(PhiConfig(**SHAPE), tmp_path)
    same_rewards(folder, documents(256)[4:6])
