"""What a stage leaves is an ordinary Hugging Face folder that is whole or not there."""

import json
import os
import resource
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tulu_lightning import files
from tulu_lightning.assets.models import load_tokenizer
from tulu_lightning.checkpoints import shards
from tulu_lightning.checkpoints.export import export, publish, weights_of
from tulu_lightning.core.packing import pack
from tulu_lightning.data.chat import chat_template, stop_ids
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.types import Document, Segment

MESSAGES = [
    {"role": "user", "content": "What is 31 + 28?"},
    {"role": "assistant", "content": "59"},
    {"role": "user", "content": "And 1 more?"},
]


@pytest.fixture
def policy(tiny):
    """A policy whose weights are not those of any folder."""
    lm = PackedLM(Backbone(tiny), tiny)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return lm


def write(policy, folder, template="tulu", **settings):
    tokenizer = load_tokenizer(policy.lm.config._name_or_path)
    bound = chat_template(template, tokenizer)
    stops = stop_ids(tokenizer, bound)
    return export(policy.lm, tokenizer, folder, bound.jinja, stops, **settings), bound, stops


def test_transformers_loads_it_with_the_same_logits(policy, tmp_path):
    folder, *_ = write(policy, tmp_path / "step-000001")
    ids = torch.arange(1, 40)
    ours = policy(pack([Document((Segment(ids, torch.ones(39)),))])).logp_N
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert loaded.dtype == torch.float32
    original = policy.lm.state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in loaded.state_dict().items())
    theirs = loaded(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    again = PackedLM(Backbone(str(folder)), str(folder))
    assert torch.equal(again(pack([Document((Segment(ids, torch.ones(39)),))])).logp_N, ours), "ours reads it exactly"


def test_it_names_nothing_that_only_this_package_has(policy, tmp_path):
    folder, *_ = write(policy, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["use_cache"] is True
    assert "tulu" not in json.dumps(config)
    assert policy.lm.config._attn_implementation == "tulu_segments", "training goes on as before"
    assert policy.lm.config.use_cache is False


@pytest.mark.parametrize("template", ["tulu", "chatml", "smollm2"])
def test_its_chat_template_writes_what_was_trained(template, policy, tmp_path):
    folder, bound, _ = write(policy, tmp_path / "out", template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert theirs == "".join(piece.text for piece in bound.render(MESSAGES, generation_prompt=True))


def test_its_generation_config_knows_every_stop_token(policy, tmp_path):
    folder, _, stops = write(policy, tmp_path / "out", "chatml")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert stops
    assert model.generation_config.eos_token_id == list(stops)
    assert model.generation_config.pad_token_id == load_tokenizer(str(folder)).pad_token_id


def test_a_tied_head_is_written_once_even_if_its_memory_is_no_longer_shared(policy, tmp_path):
    state = dict(weights_of(policy.lm))
    assert "lm_head.weight" not in state
    folder, *_ = write(policy, tmp_path / "out")
    assert load_file(folder / "model.safetensors").keys() == state.keys()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight, state["model.embed_tokens.weight"])


@pytest.mark.parametrize("method", ["weights", "rename"])
def test_killed_midway_it_leaves_no_half_folder(method, policy, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    folder = tmp_path / "exports" / "step-000001"
    with monkeypatch.context() as patch:
        if method == "rename":
            patch.setattr(os, "replace", die)
        else:
            patch.setattr(shards, "save_file", die)
        with pytest.raises(Killed):
            write(policy, folder)
    assert not folder.exists()
    assert policy.lm.config._attn_implementation == "tulu_segments"
    write(policy, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["step-000001"], "what was left is cleared away"


def test_a_failed_second_export_leaves_the_first_one(policy, tmp_path, monkeypatch):
    folder, *_ = write(policy, tmp_path / "step-000001")
    before = (folder / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write(policy, folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_killed_while_the_first_one_is_removed_the_name_is_never_half_a_folder(policy, tmp_path, monkeypatch):
    """Twice, so that the rest of the first kill is in the way; and all that was written is on the disk by then."""
    folder, *_ = write(policy, tmp_path / "step-000001")
    whole, synced = sorted(path.name for path in folder.iterdir()), []
    monkeypatch.setattr(files, "sync", lambda path: synced.append(path.name))
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", part_of(shutil.rmtree, "step-000001"))
            with suppress(Killed):
                write(policy, folder)
        assert not folder.exists() or sorted(path.name for path in folder.iterdir()) == whole
    write(policy, folder)
    assert {*whole} <= {*synced}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


class Killed(BaseException):
    pass


def part_of(rmtree, name):
    """What a kill leaves of `rmtree` when it comes to a finished folder of that name: one file less."""

    def cut(path, *args, **kwargs):
        path = Path(path)
        if name in path.name and (path / "config.json").is_file() and not path.name.endswith(f"{name}.tmp"):
            (path / "config.json").unlink()
            raise Killed
        rmtree(path, *args, **kwargs)

    return cut


def test_promoted_points_to_the_old_or_the_new_export_and_never_nowhere(tmp_path, monkeypatch):
    old, new, link = tmp_path / "exports" / "a", tmp_path / "exports" / "b", tmp_path / "promoted"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "name").write_text(folder.name)
    publish(old, link)
    assert (link / "name").read_text() == "a"

    seen = []
    replace = type(link).replace

    def watch(self, target):
        seen.append((target / "name").read_text())
        return replace(self, target)

    monkeypatch.setattr(type(link), "replace", watch)
    publish(new, link)
    assert seen == ["a"], "up to the last moment it is the old one"
    assert (link / "name").read_text() == "b"
    tmp_path.rename(tmp_path.with_name("moved"))
    moved = tmp_path.with_name("moved") / "promoted" / "name"
    assert moved.read_text() == "b", "a run folder can be moved"


def test_it_comes_in_files_of_a_chosen_size_and_transformers_reads_them_together(policy, tmp_path):
    folder, *_ = write(policy, tmp_path / "out", max_shard_bytes=2_000_000)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = {file.name: load_file(file) for file in files}
    for name, tensors in held.items():
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert size <= 2_000_000 or len(tensors) == 1
        assert all(index["weight_map"][each] == name for each in tensors)
    assert sum(map(len, held.values())) == len(index["weight_map"])
    size = sum(tensor.numel() * 4 for tensors in held.values() for tensor in tensors.values())
    assert index["metadata"]["total_size"] == size
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights_of(policy.lm))


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("200mb", 2 * 10**8), ("1.5KB", 1500)])
def test_sizes_are_read(text, size):
    assert shards.parse_size("max_shard_size", text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "5TB", "nanGB", "infGB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="max_shard_size: is"):
        shards.parse_size("max_shard_size", text)


def test_a_disk_that_refuses_weights_is_told_with_the_file(tmp_path):
    path, before = tmp_path / "model.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OSError, match="File too large") as caught:
            shards.save_tensors({"a": torch.ones(1000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename == str(path)
