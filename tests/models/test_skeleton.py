"""Networks that are built without weights and filled from their files are those that are loaded whole, byte for byte."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.models.heads import PackedReward, PackedValue
from tulu_lightning.models.lora import Lora
from tulu_lightning.models.quantize import Quantize
from tulu_lightning.models.skeleton import NotStreamedError, materialise, without_weights

CPU = torch.device("cpu")
SETTINGS = {
    "plain": {},
    "first layer": {"layers": 1},
    "stored bf16": {"compute_dtype": "bfloat16", "weights_dtype": "bfloat16"},
    "adapters": {"lora": Lora(r=4)},
    "4 bits": {"lora": Lora(r=4), "quantize": Quantize(blocksize=32)},
    "4 bits in bf16": {
        **{"compute_dtype": "bfloat16", "weights_dtype": "bfloat16", "lora": Lora(r=4)},
        "quantize": Quantize(storage="bfloat16", double_quant=False),
    },
}


def tensors(network):
    return {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }


def filled(kind, config, folder):
    with without_weights():
        network = kind(config, folder)
    materialise(network, CPU, config.lora)
    return network


def same(one, other):
    expected, found = tensors(one), tensors(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].requires_grad == tensor.requires_grad, name
        bytes_ = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (tensor, found[name])]
        assert torch.equal(*bytes_), name
    ties = [{name: id(tensor) for name, tensor in each.items()} for each in (expected, found)]
    assert len(set(ties[0].values())) == len(set(ties[1].values())), "what is tied stays tied"


@pytest.mark.parametrize("settings", list(SETTINGS))
@pytest.mark.parametrize("kind", [PackedLM, PackedReward, PackedValue])
def test_filled_is_whole_and_draws_the_same_random_numbers(kind, settings, tiny):
    config, after = Backbone(tiny, **SETTINGS[settings]), []
    networks = []
    for build in (kind, lambda config, folder: filled(kind, config, folder)):
        torch.manual_seed(3)
        networks.append(build(config, tiny))
        after.append(torch.rand(2))
    same(*networks)
    assert torch.equal(*after)


def test_nothing_has_memory_before_it_is_filled(tiny):
    with without_weights():
        network = PackedLM(Backbone(tiny), tiny)
    assert all(parameter.is_meta for parameter in network.parameters())
    assert not any(buffer.is_meta for buffer in network.buffers()), "no file has those"


def test_a_reward_models_head_goes_on(tiny, tmp_path):
    start = PackedReward(Backbone(tiny), tiny, seed=5)
    start.lm.save_pretrained(tmp_path)
    for kind in (PackedReward, PackedValue):
        same(kind(Backbone(tiny), str(tmp_path)), filled(kind, Backbone(tiny), str(tmp_path)))
    network = filled(PackedReward, Backbone(tiny), str(tmp_path))
    assert torch.equal(network.head.weight, start.head.weight)


def test_halves_and_several_files(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float16)
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    same(PackedLM(Backbone(tiny), str(tmp_path)), filled(PackedLM, Backbone(tiny), str(tmp_path)))


def test_scaled_rotary_embeddings_are_made_again(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 32, "rope_theta": 500_000.0}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, rope_parameters=rope, **sizes)).save_pretrained(tmp_path)
    same(PackedLM(Backbone("m"), str(tmp_path)), filled(PackedLM, Backbone("m"), str(tmp_path)))


def changed(tiny, folder, change):
    """A copy of the tiny model with other tensors in its file."""
    shutil.copytree(tiny, folder)
    save_file(change(load_file(f"{tiny}/model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: {k.removeprefix("model."): v for k, v in t.items()}, r"its files have no model\."),
        (lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()}, "which its config.json ties"),
        (lambda t: {k: v[:-1] if "embed" in k else v for k, v in t.items()}, "has another shape in its files"),
    ],
)
def test_other_names_and_shapes_are_left_to_transformers(tiny, tmp_path, change, reason):
    folder = changed(tiny, tmp_path / "model", change)
    with pytest.raises(NotStreamedError, match=reason), without_weights():
        PackedLM(Backbone(folder), folder)


def test_the_tied_name_that_is_stored_is_enough(tiny, tmp_path):
    rename = lambda t: {k.replace("model.embed_tokens", "lm_head"): v for k, v in t.items()}  # noqa: E731
    folder = changed(tiny, tmp_path / "model", rename)
    same(PackedLM(Backbone(tiny), tiny), filled(PackedLM, Backbone(folder), folder))


def test_a_damaged_file_is_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: is damaged"), without_weights():
        PackedLM(Backbone(tiny), str(tmp_path / "model"))


def test_a_model_that_does_not_run_packed_is_not_streamed_either(tmp_path):
    """Its small kin fails the trial; loaded whole, it is refused for what it is."""
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    GraniteForCausalLM(GraniteConfig(vocab_size=64, logits_scaling=2.0, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(NotStreamedError, match="a small one of its kind fails a trial"), without_weights():
        PackedLM(Backbone("m"), str(tmp_path))
    with pytest.raises(InputError, match="packed, its logits are off"):
        PackedLM(Backbone("m"), str(tmp_path))


# Memory ------------------------------------------------------------------------------------------------------------


def peaks(folder, ranks, tensor, replicas, tmp_path):
    """For each rank, bytes of the peak of building, and bytes of its weights."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    output = tmp_path / "peaks.json"
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", port]
    script = [Path(__file__).with_name("build_ranks.py"), output, folder, tensor, replicas]
    done = subprocess.run(
        [sys.executable, *launch, *map(str, script)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


def size_of(folder):
    return 4 * sum(t.numel() for file in Path(folder).glob("*.safetensors") for t in load_file(file).values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_rank_ever_holds_the_whole_model(smol, tmp_path):
    whole = size_of(smol)
    for peak, held in peaks(smol, 2, 1, 1, tmp_path):
        assert held == pytest.approx(whole / 2, rel=0.01)
        assert peak < 0.65 * whole


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("tensor", "replicas", "share"), [(1, 1, 4), (2, 1, 4), (1, 2, 2), (2, 2, 2)])
def test_nor_of_four_over_any_mesh(tmp_path, tensor, replicas, share):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "model", max_shard_size="200MB")
    whole = size_of(tmp_path / "model")
    for peak, held in peaks(tmp_path / "model", 4, tensor, replicas, tmp_path):
        assert held == pytest.approx(whole / share, rel=0.01)
        assert peak < (1 / share + 0.2) * whole
