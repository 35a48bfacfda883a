"""`tulu export`: a folder out of a checkpoint is what the run itself promotes, and no checkpoint runs code."""

import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tulu_lightning import cli
from tulu_lightning.assets.models import load_tokenizer, resolve_model
from tulu_lightning.checkpoints.card import LINEAGE
from tulu_lightning.checkpoints.promoted import record_path, write_record
from tulu_lightning.checkpoints.reading import TrainingCheckpoint, newest_checkpoint
from tulu_lightning.errors import InputError
from tulu_lightning.models.safe_reader import SafeReader, load_plain

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = {
    "whole": ("sft", []),
    "lora": ("sft", ["--model.backbone.lora.r=4", "--model.backbone.lora.rslora=true"]),
    "low": ("sft", ["--model.backbone.weights_dtype=bfloat16", "--model.backbone.compute_dtype=bfloat16"]),
    "qlora": ("sft", ["--model.backbone.lora.r=4", "--model.backbone.quantize.blocksize=64"]),
    "low qlora": (
        "sft",
        [
            "--model.backbone.lora.r=4",
            "--model.backbone.quantize.blocksize=64",
            "--model.backbone.weights_dtype=bfloat16",
            "--model.backbone.compute_dtype=bfloat16",
        ],
    ),
    "reward": ("reward", []),
    "cut": ("sft", ["--model.backbone.layers=2"]),
}
IDS = torch.arange(1, 60)[None]


def fit(stage, folder, *options):
    return [
        "fit", "--config", str(CONFIGS / f"{stage}_tiny.yaml"), "--data.max_steps=2",
        f"--trainer.default_root_dir={folder}", "--trainer.logger=false", *options,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run folders by name, made when first asked for."""
    base, made = tmp_path_factory.mktemp("runs"), set()

    def get(name):
        if name not in made:
            stage, options = RUNS[name]
            assert cli.main(fit(stage, base / name, *options)) == 0
            made.add(name)
        return base / name

    return get


def export(run, out, *options):
    assert cli.main(["export", "--ckpt", str(run), "--out", str(out), *options]) == 0
    return out


def weights(folder):
    found = {}
    for file in Path(folder).glob("*.safetensors"):
        found |= load_file(file)
    return found


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("name", RUNS)
def test_it_equals_what_the_run_promoted_and_loads_in_transformers(run, name, tmp_path):
    out = export(run(name), tmp_path / "out")
    promoted = run(name) / "promoted"
    same(weights(out), weights(promoted))
    for file in ("config.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (promoted / file).exists():
            theirs, ours = (json.loads(f.read_text()) if file.endswith("json") else f.read_text() for f in
                            (promoted / file, out / file))  # fmt: skip
            assert ours == theirs, file
    kind = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    one, other = (kind.from_pretrained(folder) for folder in (out, promoted))
    assert torch.equal(one(IDS).logits, other(IDS).logits)
    assert AutoTokenizer.from_pretrained(out).chat_template
    if name == "cut":
        assert len(one.model.layers) == 2


def test_an_adapter_on_its_base_is_the_merged_model(run, tmp_path):
    merged = AutoModelForCausalLM.from_pretrained(export(run("lora"), tmp_path / "merged"))
    folder = export(run("lora"), tmp_path / "adapter", "--adapter")
    base = AutoModelForCausalLM.from_pretrained(resolve_model("tiny-random-llama"))
    before = base(IDS).logits
    adapted = PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(adapted(IDS).logits, merged(IDS).logits, rtol=0, atol=1e-5)
    assert not torch.allclose(adapted(IDS).logits, before, atol=1e-3), "it was trained"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-random-llama"
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 600_000


def test_dtype_and_size_of_files_are_as_asked_for(run, tmp_path):
    out = export(run("whole"), tmp_path / "out", "--dtype", "bfloat16", "--max_shard_size", "1MB")
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    full = weights(export(run("whole"), tmp_path / "full"))
    same(weights(out), {name: tensor.bfloat16() for name, tensor in full.items()})
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_the_folder_of_a_sharded_run_is_read_without_gathering(run, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two = ["--trainer.strategy=fsdp2", "--trainer.accelerator=cpu", "--trainer.devices=2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    subprocess.run(
        [*command, "-m", "tulu_lightning", *fit("sft", tmp_path / "two", *two)],
        check=True, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    path = newest_checkpoint(tmp_path / "two")
    assert path.is_dir()
    out = export(tmp_path / "two", tmp_path / "out", "--max_shard_size", "2MB")
    same(weights(out), weights(tmp_path / "two" / "promoted"))
    for name, tensor in weights(export(run("whole"), tmp_path / "one")).items():
        torch.testing.assert_close(weights(out)[name], tensor, rtol=0, atol=1e-5)
    _refuses_code(path, tmp_path)


def test_the_card_and_the_chain_say_where_it_comes_from(run, tmp_path):
    first = export(run("whole"), tmp_path / "first")
    second = tmp_path / "run2"
    assert cli.main(fit("dpo", second, f"--model.backbone.path={first}")) == 0
    out = export(second, tmp_path / "second")
    chain = json.loads((out / LINEAGE).read_text())
    assert [(each["stage"], each["step"]) for each in chain] == [("SFT", 2), ("DPO", 2)]
    assert chain[0]["start"] == "tiny-random-llama"
    assert chain[1]["start_digest"] != chain[0]["start_digest"]
    manifest = json.loads((second / "data_manifest.json").read_text())
    assert chain[1]["data_digest"] == manifest["digest"]
    card = (out / "README.md").read_text()
    assert "Lineage: `tiny-random-llama` → SFT (2 steps) → DPO (2 steps)" in card
    assert "| `loss.beta` | 5.0 |" in card
    assert manifest["digest"][:12] in card


def test_the_card_has_the_scores_of_these_weights_alone(run, tmp_path):
    """A run's last decision says nothing of an earlier checkpoint, nor of one on which nobody decided."""
    folder = shutil.copytree(run("whole"), tmp_path / "run", symlinks=True)
    path = record_path(folder, 2)
    record = json.loads(path.read_text())
    record["scores"]["after"] = {"held-out": {"score": 0.25, "low": 0.1, "high": 0.4, "n": 60}}
    record["decision"] |= {"difference": 0.05, "reason": "the score rose by 0.05"}
    path.unlink()
    write_record(path, record)
    (folder / "summary.json").write_text(json.dumps({"decision": record["decision"]}))

    def scores(out):
        return json.loads((export(folder, out) / LINEAGE).read_text())[-1]["scores"]

    assert scores(tmp_path / "a") == {"held-out": "25.0 [10.0, 40.0], n = 60"}
    path.rename(record_path(folder, 7))
    assert scores(tmp_path / "b") == {}


def test_an_export_ends_on_what_the_runs_tokenizer_ends_on(run, tmp_path):
    """An instruct model's folder, given for its tokenizer, may name more tokens than the base that is trained."""
    tokens = shutil.copytree(resolve_model("tiny-random-llama"), tmp_path / "instruct")
    (tokens / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    folder = tmp_path / "run"
    assert cli.main(fit("sft", folder, f"--data.tokenizer={tokens}")) == 0
    ends = [
        json.loads((where / "generation_config.json").read_text())["eos_token_id"]
        for where in (folder / "promoted", export(folder, tmp_path / "out"))
    ]
    assert {7, 9} <= set(ends[0])
    assert ends[1] == ends[0]


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--dtype", "bfloat"], "--dtype: is 'bfloat'.*bfloat16"),
        (["--max_shard_size", "5"], "--max_shard_size"),
        (["--adapter"], "without LoRA"),
        (["--adapter", "--dtype", "bfloat16"], "--dtype: is given with --adapter"),
        (["--config", "/nowhere.yaml"], "there is no config of the run"),
    ],
)
def test_bad_options(run, tmp_path, options, told, capsys):
    assert cli.main(["export", "--ckpt", str(run("whole")), "--out", str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert re.search(told, said), said
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_there_and_runs_that_are_not(run, tmp_path, capsys):
    out = export(run("whole"), tmp_path / "out")
    before = weights(out)
    assert cli.main(["export", "--ckpt", str(run("lora")), "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    same(weights(out), before)
    export(run("lora"), out, "--force")
    assert not torch.equal(weights(out)["model.norm.weight"], before["model.norm.weight"])
    for ckpt, told in ((tmp_path / "none", "there is no"), (tmp_path, "has no checkpoint")):
        assert cli.main(["export", "--ckpt", str(ckpt), "--out", str(tmp_path / "x")]) == 2
        assert told in capsys.readouterr().err
    inside = run("whole") / "checkpoints" / "x"
    assert cli.main(["export", "--ckpt", str(run("whole")), "--out", str(inside)]) == 2
    assert "lies among the run's checkpoints" in capsys.readouterr().err


def test_force_replaces_earlier_exports_and_nothing_else(run, tmp_path, capsys):
    folder = shutil.copytree(run("whole"), tmp_path / "runs" / "a", symlinks=True)
    start = shutil.copytree(resolve_model("tiny-random-llama"), tmp_path / "start")
    config = tmp_path / "config.yaml"
    config.write_text((folder / "config.yaml").read_text().replace("path: tiny-random-llama", f"path: {start}"))
    (other := tmp_path / "papers").mkdir()
    (other / "thesis.tex").write_text("mine")
    (link := tmp_path / "link").symlink_to(folder / "promoted")
    (file := tmp_path / "file").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out, said in (
        (folder, "holds the run"),
        (tmp_path / "runs", "holds the run"),
        (start, "holds the start"),
        (other, "holds other things than a model"),
        (link, "was promoted|is a link"),
        (folder / "exports" / "step-000002", "was promoted"),
        (file, "is a file"),
    ):
        options = ["--ckpt", str(folder), "--config", str(config), "--out", str(out), "--force"]
        assert cli.main(["export", *options]) == 2
        assert re.search(f"--out: {out} ({said})", (heard := capsys.readouterr().err)), heard
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_checkpoint_that_has_changed_or_is_newer_is_not_exported(run, tmp_path, capsys):
    """Tensors of a damaged file load without a word; they would be other weights."""
    path = newest_checkpoint(run("whole"))
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    flipped, newer = tmp_path / "flipped.ckpt", tmp_path / "newer.ckpt"
    data = bytearray(path.read_bytes())
    data[largest.header_offset + largest.file_size // 2] ^= 1
    flipped.write_bytes(data)
    with zipfile.ZipFile(newer, "w") as archive:
        for name, part in parts.items():
            archive.writestr(
                name, json.dumps({**json.loads(part), "format": 99}) if name.endswith("tulu.json") else part
            )
    TrainingCheckpoint(flipped)  # loads
    for bad, said in ((flipped, "is damaged: the checksum of its part"), (newer, "is a checkpoint of format 99")):
        options = ["--config", str(run("whole") / "config.yaml"), "--out", str(tmp_path / "out")]
        assert cli.main(["export", "--ckpt", str(bad), *options]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_the_newest_is_the_one_after_the_most_steps(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("step-999999.ckpt", "step-1000000.ckpt", "step-999999-mine.ckpt", "step-best.ckpt"):
        (tmp_path / "checkpoints" / name).touch()
    assert newest_checkpoint(tmp_path).name == "step-1000000.ckpt"


def test_a_checkpoint_of_another_model_or_half_of_one_is_refused(run, tmp_path, capsys):
    path = newest_checkpoint(run("whole"))
    half = tmp_path / "step-000002.ckpt"
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    config = ["--config", str(run("whole") / "config.yaml"), "--out", str(tmp_path / "out")]
    assert cli.main(["export", "--ckpt", str(half), *config]) == 2
    assert "is no checkpoint, or half of one" in capsys.readouterr().err
    config[1] = str(run("cut") / "config.yaml")
    text = Path(config[1]).read_text().replace("layers: 2", "layers: null")
    (tmp_path / "config.yaml").write_text(text)
    assert cli.main(["export", "--ckpt", str(newest_checkpoint(run("cut"))), "--config", str(tmp_path / "config.yaml"),
                     "--out", str(tmp_path / "out")]) == 2  # fmt: skip
    assert "has no tensor policy.lm.model.layers.2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Code in files --------------------------------------------------------------------------------------------------------


class Bomb:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _refuses_code(checkpoint, tmp_path):
    """A checkpoint folder with code in its table, and one with code in its values."""
    for name, write in (
        (".metadata", lambda f, b: f.write_bytes(pickle.dumps(b))),
        ("meta.pt", lambda f, b: torch.save(b, f)),
    ):
        copy, mark = tmp_path / f"bad{name}.ckpt", tmp_path / f"ran{name}"
        shutil.copytree(checkpoint, copy)
        write(copy / name, Bomb(mark))
        with pytest.raises(InputError, match=r"wants|cannot be read"):
            TrainingCheckpoint(copy)
        assert not mark.exists()


def test_a_table_may_hold_nothing_but_a_table(tmp_path):
    mark = tmp_path / "ran"

    class Call:
        def __init__(self, function, *arguments):
            self.call = function, arguments

        def __reduce__(self):
            return self.call

    for value in (
        Bomb(mark),
        Call(eval, "1"),
        Call(os.system, "true"),
        Metadata({"x": Bomb(mark)}, storage_data=None),
        {"not": "a table"},
    ):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(value))
        with pytest.raises(InputError, match=r"\.metadata"):
            SafeReader(tmp_path).read_metadata()
    # What is importable from the modules of records is no record.
    for module in ("torch.distributed.checkpoint.filesystem", "torch.distributed.checkpoint.metadata"):
        for name in ("os", "pickle", "os.system", "io.open_code"):
            (tmp_path / ".metadata").write_bytes(b"\x80\x04" + f"c{module}\n{name}\n.".encode())
            with pytest.raises(InputError, match=r"\.metadata"):
                SafeReader(tmp_path).read_metadata()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({})))
    ours, theirs = (reader(tmp_path).read_metadata() for reader in (SafeReader, FileSystemReader))
    assert ours.state_dict_metadata == theirs.state_dict_metadata == {}
    assert not mark.exists()


def test_a_file_with_code_is_refused(tmp_path):
    mark = tmp_path / "ran"
    torch.save({"tulu_stage": Bomb(mark)}, tmp_path / "bad.ckpt")
    with pytest.raises(InputError, match="cannot be read as tensors and plain values"):
        load_plain(tmp_path / "bad.ckpt")
    assert not mark.exists()


def test_a_model_folders_code_is_not_run_and_pickled_weights_are_not_read(tmp_path, capsys):
    tiny, folder, mark = resolve_model("tiny-random-llama"), tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny, folder)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Model: pass\nclass Config: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    tokens["auto_map"] = {"AutoTokenizer": ["evil.Model", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    load_tokenizer(str(folder))
    assert cli.main(fit("sft", tmp_path / "run", f"--model.backbone.path={folder}")) == 0, "Llama itself is known"
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert cli.main(fit("sft", tmp_path / "run2", f"--model.backbone.path={folder}")) == 2
    assert str(folder) in capsys.readouterr().err
    assert not mark.exists()
    bad = tmp_path / "pickled"
    shutil.copytree(tiny, bad, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"model.norm.weight": Bomb(mark)}, bad / "pytorch_model.bin")
    assert cli.main(fit("sft", tmp_path / "run3", f"--model.backbone.path={bad}")) == 2
    assert "safetensors" in capsys.readouterr().err
    assert not mark.exists()
