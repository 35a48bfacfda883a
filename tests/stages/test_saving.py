"""What a checkpoint holds and says of itself, how it is written, and which ones are refused before anything loads."""

import importlib.metadata
import json
import os
import random
import re
import resource
import shutil
import signal
import threading
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import stage_runs as runs
import torch
import yaml
from stage_faults import Draws, Interrupt
from test_resume import assert_same

from tulu_lightning import __version__, cli
from tulu_lightning.callbacks.checkpoints import Checkpoints, checkpoint_path
from tulu_lightning.checkpoints import space
from tulu_lightning.checkpoints.space import Space, check_space, space_of
from tulu_lightning.errors import InputError
from tulu_lightning.models import single_file
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.models.lora import Lora
from tulu_lightning.models.saved import FORMAT, read_header
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.sft import SFT

OWN = "tulu_lightning.callbacks."
STEPS = 4


def command(folder, *options, stage="sft", callbacks=(), **saving):
    """The shipped tiny run of a stage in 4 steps, each saved."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "include": [str(runs.CONFIGS / f"{stage}_tiny.yaml")],
        "data": {"init_args": {"examples_per_step": 8, "max_steps": STEPS}},
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "logger": False,
            "callbacks": [
                {"class_path": OWN + "records.Records"},
                *callbacks,
                {"class_path": OWN + "checkpoints.Checkpoints", "init_args": {"every_n_steps": 1, "keep": 2, **saving}},
                {"class_path": OWN + "promote.Promote"},
            ],
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(path), *options]


def stop(step, number=signal.SIGTERM):
    return {"class_path": "stage_faults.Interrupt", "init_args": {"step": step, "number": int(number)}}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of an SFT run that SIGTERM stopped after 2 of 4 steps, and its exit status."""
    root = tmp_path_factory.mktemp("stopped")
    status = cli.main(command(root, callbacks=[stop(2)]))
    return root, status


@pytest.fixture
def copied(stopped, tmp_path):
    """A copy of it, for a test to change."""
    shutil.copytree(stopped[0], tmp_path / "copy", dirs_exist_ok=True)
    return tmp_path / "copy"


def test_a_schedulers_signal_saves_and_ends_with_a_status_of_its_own(stopped):
    root, status = stopped
    assert status == cli.PREEMPTED == 75
    assert sorted(p.name for p in (root / "run/checkpoints").iterdir()) == ["step-000001.ckpt", "step-000002.ckpt"]


def test_a_checkpoint_says_what_it_is(stopped):
    header = read_header(checkpoint_path(stopped[0] / "run", 2))
    assert (header.format, header.stage, header.step, header.ranks) == (FORMAT, "SFT", 2, 1)
    assert header.versions["tulu_lightning"] == __version__
    assert header.versions["torch"] == importlib.metadata.version("torch"), "without the build, which may differ"
    assert header.identity == json.loads((stopped[0] / "run/identity.json").read_text())
    assert len(header.identity["data rows"]) == len(header.identity["start weights"]) == 64
    assert header.config["data"]["init_args"]["max_steps"] == STEPS
    held = torch.load(checkpoint_path(stopped[0] / "run", 2), weights_only=True)
    assert held["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"step": 2}]
    assert {"python", "numpy", "torch", "cuda"} == held["tulu_random"][0].keys()


def test_one_line_says_what_is_gone_on_from_and_what_has_changed_since(copied, capsys):
    argv = command(copied, "--data.init_args.micro_tokens=300", keep=3)
    assert cli.main(argv) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("fit: "))
    path = checkpoint_path(copied / "run", 2)
    assert said.startswith(f"fit: resuming from {path} (step 2); changed since: ")
    changed = said.partition("changed since: ")[2]
    assert "data.init_args.micro_tokens: 1024 -> 300" in changed
    assert "trainer.callbacks.1.init_args.keep: 2 -> 3" in changed or "stage_faults.Interrupt" in changed
    assert "ckpt_path" not in changed


def test_what_changes_the_mathematics_is_accepted_by_name_alone(copied, capsys):
    change = ("--model.init_args.optimizer.lr=0.5", "--data.init_args.seed=7")
    assert cli.main(command(copied, *change)) == 2
    said = capsys.readouterr()
    assert "optimizer.lr: 0.001 -> 0.5" in said.out, "the line comes first"
    assert "optimizer.lr was 0.001 and is 0.5; data.seed was 0 and is 7." in said.err
    assert "--accept_changes='optimizer.lr,data.seed'" in said.err
    assert cli.main(command(copied, *change, "--accept_changes=optimizer.lr")) == 2
    assert "other settings: data.seed was 0 and is 7." in capsys.readouterr().err
    assert cli.main(command(copied, *change, "--accept_changes=optimizer.rl")) == 2
    assert "accept_changes: names 'optimizer.rl'" in (said := capsys.readouterr().err)
    assert "Did you mean 'optimizer.lr'?" in said
    assert cli.main(command(copied, *change, "--accept_changes=optimizer.lr,data.seed")) == 0
    header = read_header(checkpoint_path(copied / "run", STEPS))
    assert (header.identity["optimizer.lr"], header.identity["data.seed"]) == (0.5, 7)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _newer(path):
    beside = path.with_suffix(".new")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(beside, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, json.dumps({**json.loads(data), "format": 99}) if name.endswith("/tulu.json") else data)
    beside.replace(path)


def _folder(path):
    path.unlink()
    path.mkdir()
    (path / "__0_0.distcp").write_bytes(b"part")


DAMAGE = {
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-1000]), r"is no checkpoint, or half of one \(\d+ bytes;"),
    "empty": (lambda p: p.write_bytes(b""), r"is no checkpoint, or half of one \(0 bytes;"),
    "flipped": (_flip, r"is damaged"),
    "newer": (_newer, rf"is a checkpoint of format 99, written by tulu_lightning .*reads up to {FORMAT}\. Update"),
    "folder": (_folder, r"is no checkpoint, or half of one: it has no \.metadata and no meta\.pt"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name_before_weights_load(copied, capsys, monkeypatch, damage):
    spoil, said = DAMAGE[damage]
    path = checkpoint_path(copied / "run", 2)
    spoil(path)
    monkeypatch.setattr(Backbone, "load", lambda *_: pytest.fail("weights were loaded"))
    assert cli.main(command(copied)) == 2
    error = capsys.readouterr().err
    assert f"tulu: error: {path}: " in error
    assert re.search(said, error), error
    if damage != "newer":
        assert f"Remove {path}; ckpt_path: auto then goes on from step-000001.ckpt." in error


@pytest.mark.parametrize("given", ["run", "model", "config.yaml", "run/metrics.jsonl"])
def test_what_is_no_checkpoint_is_not_advised_to_be_removed(copied, tiny, capsys, given):
    """A run folder, a model or a file given by mistake: removing it would be the loss."""
    shutil.copytree(tiny, copied / "model")
    path = copied / given
    assert cli.main(command(copied, f"--ckpt_path={path}")) == 2
    error = capsys.readouterr().err
    assert f"tulu: error: {path}: is no checkpoint, or half of one" in error
    assert "Remove" not in error
    inside = checkpoint_path(copied / "run", 2) if given == "run" else "RUN/checkpoints/step-….ckpt"
    assert f"Give a checkpoint of tulu fit{':' if given == 'run' else ','} {inside}." in error


def test_another_stages_checkpoint_is_refused_before_weights_load(stopped, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Backbone, "load", lambda *_: pytest.fail("weights were loaded"))
    path = checkpoint_path(stopped[0] / "run", 2)
    assert cli.main(command(tmp_path, f"--ckpt_path={path}", stage="dpo")) == 2
    assert f"{path}: is a checkpoint of SFT, and the config is of DPO. Give one of DPO" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.init_args.backbone.layers=1", "backbone.layers was None and is 1"),
        ("--data.init_args.template=chatml", "data rows was "),
    ],
)
def test_a_checkpoint_of_another_model_or_other_rows_is_refused_before_weights_load(
    stopped, tmp_path, capsys, monkeypatch, option, said
):
    """Given by path, to a run folder that has no record of its own."""
    monkeypatch.setattr(Backbone, "load", lambda *_: pytest.fail("weights were loaded"))
    path = checkpoint_path(stopped[0] / "run", 2)
    assert cli.main(command(tmp_path, f"--ckpt_path={path}", option)) == 2
    error = capsys.readouterr().err
    assert f"{path}: the run was started with other settings: {said}" in error


def test_accepting_another_model_does_not_make_its_tensors_fit(stopped, tmp_path):
    path = checkpoint_path(stopped[0] / "run", 2)
    names = "backbone.layers"
    argv = command(tmp_path, f"--ckpt_path={path}", "--model.init_args.backbone.layers=1", f"--accept_changes={names}")
    with pytest.raises(
        InputError, match=r"holds another model: policy\.lm\.model\.layers\.1\.\S+ is \[\d.*\] in it and not"
    ):
        cli._dispatch(argv)


def test_last_wants_a_checkpoint_and_none_wants_an_empty_folder(copied, tmp_path, capsys):
    assert cli.main(command(tmp_path / "new", "--ckpt_path=last")) == 2
    assert "ckpt_path: is last, and " in (said := capsys.readouterr().err)
    assert "holds no checkpoint. Use auto" in said
    assert cli.main(command(copied, "--ckpt_path=none")) == 2
    said = capsys.readouterr()
    assert "fit: starting fresh" in said.out
    assert "the run would start from step 0, and the folder holds checkpoints/step-000001.ckpt" in said.err
    assert cli.main(command(copied, "--ckpt_path=last")) == 0
    assert "(step 2)" in capsys.readouterr().out


# Writing --------------------------------------------------------------------------------------------------------


def test_generators_of_the_process_go_on_where_they_were(tmp_path):
    whole, half, rest = Draws(), Draws(), Draws()
    random.seed(3), np.random.seed(3)
    runs.fit(runs.sft(), runs.sft_data(max_steps=STEPS), tmp_path / "whole", callbacks=[whole])
    random.seed(3), np.random.seed(3)
    runs.fit(runs.sft(), runs.sft_data(max_steps=STEPS), tmp_path / "half", callbacks=[half, Interrupt(2)])
    random.seed(4), np.random.seed(4)
    path = checkpoint_path(tmp_path / "half", 2)
    runs.fit(runs.sft(), runs.sft_data(max_steps=STEPS), tmp_path / "half", ckpt_path=path, callbacks=[rest])
    assert half.drawn + rest.drawn == whole.drawn
    assert len({draw for draws in whole.drawn for draw in draws}) == 3 * STEPS


def test_training_beside_a_save_does_not_alter_what_is_saved(tmp_path, monkeypatch):
    """The write of step 2 begins once training wants to save step 3: every weight has changed by then."""
    runs.fit(runs.sft(), runs.sft_data(max_steps=3), tmp_path / "plain", every_n_steps=1)
    begin, inner, began = threading.Event(), single_file.SingleFile._write, []

    def late(self, checkpoint, path):
        if path.name == "step-000002.ckpt":
            began.append(begin.wait(60))
        inner(self, checkpoint, path)

    class Begin(runs.L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if pl_module.step == 3:
                assert not checkpoint_path(tmp_path / "beside", 2).exists(), "it is being written, and has no name yet"
                begin.set()

    monkeypatch.setattr(single_file.SingleFile, "_write", late)
    trainer = runs.L.Trainer(
        **{"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False},
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path / "beside",
        callbacks=[Begin(), Checkpoints(1, keep=9, background=True)],
    )
    torch.manual_seed(0)
    trainer.fit(runs.sft(), runs.sft_data(max_steps=3))
    assert began == [True]
    for step in (1, 2, 3):
        one, other = (torch.load(checkpoint_path(tmp_path / name, step)) for name in ("plain", "beside"))
        for part in ("state_dict", "optimizer_states", "tulu_random"):
            assert_same(one[part], other[part])
        sizes = [checkpoint_path(tmp_path / name, step).stat().st_size for name in ("plain", "beside")]
        assert abs(sizes[1] - sizes[0]) < 100_000, "tied weights, 270 kB, lie there once"


def test_older_checkpoints_go_and_files_of_the_users_own_stay(tmp_path):
    mine = {"step-best.ckpt", "step-000002-mine.ckpt", "best.ckpt"}
    for name in (*mine, "step-000003.ckpt", "step-999999.ckpt", "step-1000000.ckpt", "step-1000001.ckpt"):
        (tmp_path / name).touch()
    Checkpoints(1, keep=1)._drop_older(tmp_path / "step-1000000.ckpt")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*mine, "step-1000000.ckpt", "step-1000001.ckpt"}


@pytest.fixture
def file_limit():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_fills_up_within_a_save_leaves_the_last_good_checkpoint(tmp_path, capsys, file_limit, background):
    fault = {"class_path": "stage_faults.SmallDisk", "init_args": {"step": 3, "limit": 50_000}}
    assert cli.main(command(tmp_path, callbacks=[fault], background=background)) == 2
    said = capsys.readouterr()
    beside = tmp_path / "run/checkpoints/.step-000003.ckpt.tmp"
    assert f"tulu: error: {beside}: {os.strerror(27)}. Raise the limit" in said.err
    if background:
        assert "checkpoint step-000003.ckpt could not be written" in said.out
    assert sorted(p.name for p in beside.parent.iterdir()) == ["step-000001.ckpt", "step-000002.ckpt"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert cli.main(command(tmp_path)) == 0
    assert "(step 2)" in capsys.readouterr().out


# Room on the disk -----------------------------------------------------------------------------------------------


def test_a_run_that_the_disk_has_no_room_for_is_refused_with_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(Backbone, "load", lambda *_: pytest.fail("weights were loaded"))
    many = 10**9
    trainer = runs.L.Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, callbacks=[Checkpoints(1, keep=many)], max_epochs=1
    )
    data = runs.sft_data(max_steps=many)
    with pytest.raises(
        InputError, match=r"the run takes up to [\d.e+]+ TB \(1000000000 checkpoints of [\d.]+ MB: weights .*has"
    ):
        trainer.fit(runs.sft(), data)


def test_half_a_save_of_a_kill_is_room_for_the_next_one(tmp_path, monkeypatch):
    """The first save removes it; the same command again must not be refused for it."""
    stage = SimpleNamespace(total_steps=4)
    monkeypatch.setattr(space, "space_of", lambda _: Space(weights=1000, moments=2000, engine=0, export=1000))
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: SimpleNamespace(free=2000))
    (tmp_path / "checkpoints").mkdir()
    checkpoint_path(tmp_path, 1).write_bytes(bytes(3000))
    with pytest.raises(InputError, match=r"the run takes up to 7 kB .* and the disk has 5 kB"):
        check_space(tmp_path, stage, 1, 1)
    half = tmp_path / "checkpoints" / ".step-000002.ckpt.tmp"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(bytes(2500))
    check_space(tmp_path, stage, 1, 1)


def test_exports_that_may_come_on_top_are_warned_of(tmp_path, monkeypatch):
    """Two checkpoints of 3 kB and an export of 1 kB have room in 9 kB, three more exports have not."""
    monkeypatch.setattr(space, "space_of", lambda _: Space(weights=1000, moments=2000, engine=0, export=1000))
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: SimpleNamespace(free=9000))
    with warnings.catch_warnings(action="error"):
        check_space(tmp_path, SimpleNamespace(total_steps=4), 1, 1)
    with pytest.warns(
        UserWarning, match=r"takes up to 7 kB .* the disk has 9 kB; 3 more exports.* take 3 kB beside it"
    ):
        check_space(tmp_path, SimpleNamespace(total_steps=4), 1, 1, exports=4)


NETWORKS = {
    **{name: runs.STAGES[name] for name in ("sft", "reward", "ppo", "grpo")},
    "lora": (lambda: SFT(Backbone(runs.TINY, lora=Lora(r=4)), AdamW(lr=1e-3)), runs.sft_data),
    "bf16": (lambda: SFT(Backbone(runs.TINY, "bfloat16", "bfloat16"), AdamW(lr=1e-3)), runs.sft_data),
    "cut": (lambda: SFT(Backbone(runs.TINY, layers=1), AdamW(lr=1e-3)), runs.sft_data),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_room_for_a_checkpoint_is_told_from_shapes(tmp_path, name):
    build, data = NETWORKS[name]
    found = {}

    class Estimate(runs.L.Callback):
        def setup(self, trainer, pl_module, stage):
            assert pl_module.policy is None, "nothing is built yet"
            found["space"] = space_of(pl_module)

    runs.fit(build(), data(max_steps=1), tmp_path, callbacks=[Estimate()])
    held = torch.load(checkpoint_path(tmp_path, 1), weights_only=True)
    storages = {t.untyped_storage().data_ptr(): t for t in held["state_dict"].values()}  # tied tensors lie there once
    weights = sum(t.nbytes for t in storages.values())
    moments = sum(
        values[m].nbytes
        for optimizer in held["optimizer_states"]
        for values in optimizer["state"].values()
        for m in ("exp_avg", "exp_avg_sq")
    )
    assert found["space"].weights == pytest.approx(weights, rel=0.01)
    assert found["space"].moments == pytest.approx(moments, rel=0.01)
