"""A run goes on only as the run that it is: other settings are refused by name, and what only sets speed may change."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import stage_runs as runs
import torch
from safetensors.torch import load_file, save_file
from stage_faults import Interrupt

from tulu_lightning import cli
from tulu_lightning.assets.arithmetic import prompt_rows
from tulu_lightning.assets.models import resolve_model
from tulu_lightning.callbacks.checkpoints import Checkpoints, checkpoint_path
from tulu_lightning.callbacks.evaluate import Evaluate
from tulu_lightning.callbacks.records import Records
from tulu_lightning.checkpoints.identity import check_identity, flat, weights_digest
from tulu_lightning.core.estimators import GAE
from tulu_lightning.core.policy import ClippedPolicy
from tulu_lightning.core.preference import DPO as DPOLoss
from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.stages.dpo import DPO
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.sft import SFT

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS, STOP = 3, 1


@pytest.fixture
def stopped(tmp_path):
    """The folder of an SFT run that was stopped after its first step."""
    runs.fit(runs.sft(), runs.sft_data(max_steps=STEPS), tmp_path, callbacks=[Interrupt(STOP)])
    return tmp_path


def go_on(folder, stage, data):
    return runs.fit(stage, data, folder, ckpt_path=checkpoint_path(folder, STOP))


def other_weights(folder):
    """A copy of the tiny model with one number changed."""
    source = resolve_model(runs.TINY)
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
            continue
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, folder / path.name, {"format": "pt"})
    return str(folder)


CHANGES = {
    "optimizer.lr was 0.001 and is 0.05": (lambda: runs.sft(lr=0.05), {}),
    "optimizer.schedule was linear and is constant": (lambda: runs.sft(schedule="constant"), {}),
    "data.seed was 0 and is 9": (runs.sft, {"seed": 9}),
    "data.examples_per_step was 8 and is 4": (runs.sft, {"examples_per_step": 4}),
    "total steps was 3 and is 4": (runs.sft, {"max_steps": 4}),
    "data rows was ": (runs.sft, {"template": "chatml"}),
}


@pytest.mark.parametrize("said", CHANGES)
def test_other_settings_are_refused_by_name_with_both_values(said, stopped):
    stage, data = CHANGES[said]
    before = checkpoint_path(stopped, STOP).read_bytes()
    with pytest.raises(InputError) as caught:
        go_on(stopped, stage(), runs.sft_data(**{"max_steps": STEPS, **data}))
    assert said in str(caught.value)
    assert ";" not in str(caught.value).split("other settings:")[1], "nothing else is named"
    assert "give another run folder" in str(caught.value)
    assert checkpoint_path(stopped, STOP).read_bytes() == before


def test_every_changed_setting_is_named(stopped):
    with pytest.raises(InputError, match=r"optimizer\.lr was 0\.001 and is 0\.1; data\.seed was 0 and is 9\."):
        go_on(stopped, runs.sft(lr=0.1), runs.sft_data(max_steps=STEPS, seed=9))


def test_a_checkpoint_taken_elsewhere_still_knows_what_it_is(stopped, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = checkpoint_path(stopped, STOP)
    with pytest.raises(InputError, match=r"^ckpt_path: .*optimizer\.lr was 0\.001 and is 0\.1"):
        runs.fit(runs.sft(lr=0.1), runs.sft_data(max_steps=STEPS), elsewhere, ckpt_path=path)
    watch = runs.fit(runs.sft(), runs.sft_data(max_steps=STEPS), elsewhere, ckpt_path=path)
    assert len(watch.history) == STEPS - STOP


def test_other_start_weights_are_refused(stopped, tmp_path_factory):
    folder = other_weights(tmp_path_factory.mktemp("other") / "model")
    with pytest.raises(InputError, match=r"start weights was .*… and is .*…"):
        go_on(stopped, SFT(Backbone(folder), AdamW(lr=1e-3)), runs.sft_data(max_steps=STEPS))


def edited(folder, name, **values):
    """A copy of the tiny model with entries of a JSON file of it changed."""
    shutil.copytree(resolve_model(runs.TINY), folder, dirs_exist_ok=True)
    file = folder / name
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **values}))
    return str(folder)


def test_the_same_weights_under_another_config_are_refused(tmp_path):
    start = tmp_path / "model"
    build = lambda: SFT(Backbone(edited(start, "config.json")), AdamW(lr=1e-3))  # noqa: E731
    runs.fit(build(), runs.sft_data(max_steps=STEPS), tmp_path / "run", callbacks=[Interrupt(STOP)])
    edited(start, "config.json", rms_norm_eps=0.1)
    with pytest.raises(InputError, match=r"other settings: start config was \S+… and is \S+…\. Set it back"):
        go_on(tmp_path / "run", SFT(Backbone(str(start)), AdamW(lr=1e-3)), runs.sft_data(max_steps=STEPS))
    shutil.rmtree(start)
    edited(start, "config.json", transformers_version="9.9", use_cache=False)  # says nothing of the network
    go_on(tmp_path / "run", SFT(Backbone(str(start)), AdamW(lr=1e-3)), runs.sft_data(max_steps=STEPS))


def test_ppos_samples_must_go_on_ending_where_they_did(tmp_path):
    start = tmp_path / "model"
    edited(start, "generation_config.json", eos_token_id=[3, 258])
    runs.fit(runs.ppo(path=str(start)), runs.prompt_data(max_steps=2), tmp_path / "run", callbacks=[Interrupt(STOP)])
    edited(start, "generation_config.json", eos_token_id=[258])
    with pytest.raises(InputError, match=r"other settings: stop ids was \[3, 258\] and is \[258\]\."):
        go_on(tmp_path / "run", runs.ppo(path=str(start)), runs.prompt_data(max_steps=2))


def test_what_only_sets_speed_may_change(stopped):
    """Passes, saving, callbacks: the rows and the divisions stay."""
    data = runs.sft_data(max_steps=STEPS, micro_tokens=1024)
    extra = Records(rollouts_per_step=1)
    path = checkpoint_path(stopped, STOP)
    watch = runs.fit(runs.sft(), data, stopped, ckpt_path=path, callbacks=[extra], every_n_steps=1)
    assert len(watch.history) == STEPS - STOP


def test_the_loss_is_part_of_what_a_run_is(tmp_path):
    runs.fit(runs.dpo(), runs.preference_data(max_steps=STEPS), tmp_path, callbacks=[Interrupt(STOP)])
    other = DPO(Backbone(runs.TINY), AdamW(lr=1e-4), DPOLoss(beta=1.0))
    with pytest.raises(InputError, match=r"loss\.beta was 5\.0 and is 1\.0\."):
        go_on(tmp_path, other, runs.preference_data(max_steps=STEPS))


def test_ppos_settings_are_all_part_of_it_but_not_how_it_cuts(tmp_path):
    runs.fit(runs.ppo(), runs.prompt_data(max_steps=2), tmp_path, callbacks=[Interrupt(STOP)])
    other = runs.ppo(advantage=GAE(gamma=0.9), policy_loss=ClippedPolicy(clip_high=0.3), micro_tokens=64)
    with pytest.raises(InputError) as caught:
        go_on(tmp_path, other, runs.prompt_data(max_steps=2))
    said = str(caught.value)
    assert "advantage.gamma was 1.0 and is 0.9; policy_loss.clip_high was 0.2 and is 0.3." in said
    go_on(tmp_path, runs.ppo(micro_tokens=64), runs.prompt_data(max_steps=2))


def test_a_fresh_start_over_a_run_is_refused_and_changes_nothing(stopped):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"start from step 0, and the folder holds checkpoints/step-000001\.ckpt"):
        runs.fit(runs.sft(), runs.sft_data(max_steps=STEPS), stopped)
    with pytest.raises(InputError, match=r"optimizer\.lr was 0\.001 and is 0\.1"):
        runs.fit(runs.sft(lr=0.1), runs.sft_data(max_steps=STEPS), stopped)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("left", ["summary.json", "scores/after.json"])
def test_a_run_without_checkpoints_that_got_somewhere_is_not_started_over(left, tmp_path):
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_text("{}")
    with pytest.raises(InputError, match=f"the folder holds {left}"):
        runs.fit(runs.sft(), runs.sft_data(max_steps=1), tmp_path)


def test_a_run_killed_before_its_first_checkpoint_simply_starts_again(stopped):
    checkpoint_path(stopped, STOP).unlink()
    (stopped / "scores").mkdir()
    (stopped / "scores" / "before.json").write_text("{}")
    watch = runs.fit(runs.sft(), runs.sft_data(max_steps=STEPS), stopped)
    assert len(watch.history) == STEPS
    steps = [json.loads(line)["step"] for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_scores_of_other_settings_are_not_taken_over(stopped):
    checkpoint_path(stopped, STOP).unlink()
    (stopped / "scores").mkdir()
    (stopped / "scores" / "before.json").write_text("{}")
    with pytest.raises(InputError, match=r"data\.seed was 0 and is 9"):
        runs.fit(runs.sft(), runs.sft_data(max_steps=STEPS, seed=9), stopped)


def test_a_run_taken_back_keeps_its_new_checkpoint_and_overwrites(tmp_path):
    runs.fit(runs.sft(), runs.sft_data(max_steps=STEPS), tmp_path, every_n_steps=1)
    path = checkpoint_path(tmp_path, 2)
    path.write_bytes(b"not a checkpoint")
    runs.fit(runs.sft(), runs.sft_data(max_steps=STEPS), tmp_path, checkpoint_path(tmp_path, 1), every_n_steps=1)
    assert torch.load(path, weights_only=False)["tulu_stage"]["step"] == 2


def test_a_link_is_followed_once(tmp_path):
    """`promoted` may be moved to other weights while a run that started from it is not at its end."""
    link = tmp_path / "promoted"
    os.symlink(resolve_model(runs.TINY), link)
    stage = SFT(Backbone(str(link)), AdamW(lr=1e-3))
    assert stage.start == str(link)
    assert stage.folder == os.path.realpath(resolve_model(runs.TINY))


def test_the_digest_is_of_names_sizes_and_content(tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").write_bytes(b"\0" * 100)
    one = weights_digest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert weights_digest(str(tmp_path)) == one
    (tmp_path / "a.safetensors").write_bytes(b"\0" * 99 + b"\1")
    two = weights_digest(tmp_path)
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    assert len({one, two, weights_digest(tmp_path)}) == 3

    own = "tulu_lightning.files."
    for name, value in (("FULL_BYTES", 0), ("STRIDE", 64), ("PIECE", 8)):
        monkeypatch.setattr(own + name, value)
    sampled = weights_digest(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"\0" * 66 + b"\1" + b"\0" * 32 + b"\1")  # byte 66: in the second piece
    assert weights_digest(tmp_path) != sampled


def test_the_digest_of_the_data_is_of_the_rows_alone(tmp_path):
    digest = runs.sft_data().digest()
    assert runs.sft_data(seed=5, examples_per_step=3, micro_tokens=999).digest() == digest
    assert runs.sft_data(template="chatml").digest() != digest
    prompts = runs.prompt_data()
    other = runs.prompt_data()
    assert prompts.digest() == other.digest()
    rows = prompt_rows(40)
    rows[3]["ground_truth"] = "7"
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = runs.prompt_data(sources=[Source("sums", path=str(path))])
    assert prompts.digest() != other.digest()
    rows[3]["ground_truth"] = prompts.prompts[3].target
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prompts.digest() == runs.prompt_data(sources=[Source("sums", path=str(path))]).digest()


def test_a_setting_is_flat_and_says_its_class():
    assert flat("loss", DPOLoss(2.0)) == {"loss": "DPO", "loss.beta": 2.0, "loss.length_normalised": True}
    own = SimpleNamespace(beta=2.0, name="mine", _cache=3)  # of a class that is no dataclass
    assert flat("loss", own) == {"loss": "SimpleNamespace", "loss.beta": 2.0, "loss.name": "mine"}
    assert flat("weights", {"b": 1, "a": 0.5}) == {"weights": '{"a": 0.5, "b": 1}'}
    check_identity("here", {"loss": "DPO", "loss.old": 1}, {"loss": "DPO", "loss.new": 1})
    with pytest.raises(InputError, match="loss was DPO and is Other"):
        check_identity("here", {"loss": "DPO"}, {"loss": "Other"})


@pytest.mark.parametrize("bad", [{"keep": 0}, {"every_n_steps": -1}])
def test_saving_never_or_keeping_nothing_is_refused(bad):
    with pytest.raises(InputError):
        Checkpoints(**bad)


def test_a_refused_start_leaves_the_config_of_the_run_as_it_was(tmp_path, capsys):
    command = ["fit", "--config", str(CONFIGS / "sft_tiny.yaml"), f"--trainer.default_root_dir={tmp_path}"]
    assert cli.main(command) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["start_digest"] == weights_digest(resolve_model(runs.TINY))
    before = (tmp_path / "config.yaml").read_text()
    capsys.readouterr()
    assert cli.main([*command, "--model.init_args.optimizer.lr=0.05", "--seed_everything=9"]) == 2
    said = capsys.readouterr().err
    assert "optimizer.lr was 0.001 and is 0.05; seed_everything was 1 and is 9." in said
    assert (tmp_path / "config.yaml").read_text() == before
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_held_out_scores_are_taken_over_only_if_they_compare(tmp_path):
    sums = Source("held-out", rows=runs.ROWS + "heldout_rows", args={"count": 8})

    def start(tokens, **more):
        evaluate = Evaluate([sums], tokens)
        runs.fit(runs.sft(), runs.sft_data(max_steps=2), tmp_path, callbacks=[evaluate, *more.pop("also", ())], **more)
        return evaluate

    start(2, also=[Interrupt(1)])
    path = checkpoint_path(tmp_path, 1)
    with pytest.raises(InputError, match=r"before\.json: its scores are of other held-out prompts or sampling"):
        start(3, ckpt_path=path)
    evaluate = start(2, ckpt_path=path)
    before, after = (evaluate.scores[moment]["held-out"] for moment in ("before", "after"))
    assert before.settings == after.settings
