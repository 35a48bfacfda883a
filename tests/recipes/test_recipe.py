"""The shipped tiny recipe: end to end, run again, stopped and run again."""

import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tulu_lightning import cli
from tulu_lightning.assets.models import resolve_model
from tulu_lightning.checkpoints.identity import weights_digest
from tulu_lightning.data.base import StepData
from tulu_lightning.errors import InputError
from tulu_lightning.recipes.recipe import main
from tulu_lightning.recipes.records import read_run
from tulu_lightning.recipes.report_changes import from_files
from tulu_lightning.stages.dpo import DPO
from tulu_lightning.stages.sft import SFT
from tulu_lightning.stages.stage import Stage

CONFIGS = Path(__file__).parents[2] / "configs"
STAGES = ("sft", "dpo", "ppo")


def argv(run):
    return ["--config", str(CONFIGS / "recipes" / "tiny.yaml"), f"--run={run}"]


def summary(run, stage):
    return json.loads((run / stage / "summary.json").read_text())


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run folder of one undisturbed run."""
    run = tmp_path_factory.mktemp("recipe") / "run"
    assert main(argv(run)) == 0
    return run


def test_each_stage_starts_from_the_last_ones_promoted_checkpoint(finished):
    assert [summary(finished, stage)["stage"] for stage in STAGES] == list(STAGES)
    assert [summary(finished, stage)["promoted"] for stage in STAGES] == [True] * 3
    for before, after in itertools.pairwise(STAGES):
        assert Path(summary(finished, after)["start"]).samefile(finished / before / "promoted")
    weights = [load_file(finished / stage / "promoted" / "model.safetensors") for stage in STAGES]
    for one, other in itertools.pairwise(weights):
        assert any(not torch.equal(one[name], other[name]) for name in one), "the stage learned something"


def test_it_ends_with_a_checkpoint_a_report_and_a_record(finished):
    AutoModelForCausalLM.from_pretrained(finished / "ppo" / "promoted")
    assert (finished / "report.html").stat().st_size > 0
    record = json.loads((finished / "recipe.json").read_text())
    assert record["stages"] == list(STAGES)
    assert record["seeds"] == {"seed": 1}
    assert record["versions"]["torch"] == torch.__version__
    for stage in STAGES:
        config = yaml.safe_load((finished / stage / "config.yaml").read_text())
        assert config["trainer"]["default_root_dir"] == str(finished / stage)


def test_each_stage_records_what_the_recipe_set_over_its_files(finished):
    ppo = read_run(finished).stages[2]
    changes = {change.key: (change.one, change.other) for change in from_files(ppo) or ()}
    assert changes["trainer.default_root_dir"] == ("runs/ppo_tiny", str(finished / "ppo"))
    assert changes["model.init_args.backbone.path"][1] == str(finished / "dpo" / "promoted")
    assert "model.init_args.optimizer.lr" not in changes
    assert any(name.endswith("configs/ppo_tiny.yaml") for name in ppo.origin["files"])
    page = (finished / "report.html").read_text()
    assert "Set over <code>" in page
    assert page.count("<b>Peak memory</b>") == 3


def test_a_second_run_does_nothing_again(finished, monkeypatch, capsys):
    def files():
        return {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != "report.html"}

    def built(*args, **kwargs):
        pytest.fail("a finished stage was built again")

    before = files()
    monkeypatch.setattr(Stage, "__init__", built)
    assert main(argv(finished)) == 0
    assert files() == before
    assert capsys.readouterr().out.count("finished before") == 3


@pytest.mark.slow
def test_ctrl_c_in_dpo_ends_with_130_and_the_same_command_goes_on(finished, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    start = DPO.on_train_batch_start

    def interrupted(self, batch, batch_idx):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return start(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DPO, "on_train_batch_start", interrupted)
        assert cli.main(["recipe", *argv(run)]) == 130
    said = capsys.readouterr()
    assert f"the same command goes on from where {run} is" in said.out
    assert (run / "sft" / "summary.json").exists()
    assert not (run / "dpo" / "summary.json").exists()
    assert not (run / "ppo").exists()
    untouched = (run / "sft" / "summary.json").stat().st_mtime_ns

    assert cli.main(["recipe", *argv(run)]) == 0
    said = capsys.readouterr().out
    assert "== sft: finished before" in said
    assert "(step 3)" in said
    assert (run / "sft" / "summary.json").stat().st_mtime_ns == untouched
    starts = json.loads((run / "recipe.json").read_text())["starts"]
    assert [start["versions"]["torch"] for start in starts] == [torch.__version__] * 2
    for stage in STAGES:
        assert steps(run / stage) == steps(finished / stage)
        one, other = (load_file(folder / stage / "promoted" / "model.safetensors") for folder in (run, finished))
        assert all(torch.equal(one[name], other[name]) for name in one), "as if it had never been stopped"


def test_ctrl_c_in_a_stages_last_step_finishes_the_stage_and_stops_the_recipe(tmp_path, monkeypatch):
    run = tmp_path / "run"
    start = SFT.on_train_batch_start

    def interrupted(self, batch, batch_idx):
        if self.step == self.total_steps - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return start(self, batch, batch_idx)

    monkeypatch.setattr(SFT, "on_train_batch_start", interrupted)
    assert cli.main(["recipe", *argv(run)]) == 130
    assert summary(run, "sft")["promoted"] is True
    assert not (run / "dpo").exists()


def test_ctrl_c_outside_the_steps_also_ends_with_130(tmp_path, monkeypatch, capsys):
    def ctrl_c(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(StepData, "setup", ctrl_c)
    assert cli.main(["recipe", *argv(tmp_path / "run")]) == 130
    assert capsys.readouterr().err.endswith("tulu: interrupted; run the same command again to go on\n")


def test_a_folder_of_another_recipe_is_refused(finished):
    with pytest.raises(InputError, match="was started with another seed"):
        main([*argv(finished), "--seed=2"])


def test_a_finished_stage_whose_start_weights_were_made_anew_is_refused(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    record = json.loads((run / "recipe.json").read_text())
    record["settings"]["run"] = str(run)
    (run / "recipe.json").write_text(json.dumps(record))
    promoted = run / "sft" / "promoted"
    assert summary(run, "dpo")["start_digest"] == weights_digest(promoted)
    assert main(argv(run)) == 0

    weights = load_file(promoted / "model.safetensors")
    save_file({name: 2 * w for name, w in weights.items()}, promoted / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"dpo: started from other weights than .*sft/promoted holds now\. Remove"):
        main(argv(run))


def recipe(tmp_path, *stages, **settings):
    path = tmp_path / "recipe.yaml"
    run = str(tmp_path / "run")
    path.write_text(yaml.safe_dump({"name": "mine", "run": run, "stages": list(stages), **settings}))
    return ["--config", str(path)]


def test_a_stage_whose_config_is_missing_is_refused_before_any_stage_runs(tmp_path):
    first = {"name": "sft", "fit": str(CONFIGS / "sft_tiny.yaml")}
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        main(recipe(tmp_path, first, {"name": "dpo", "fit": "nowhere.yaml"}))
    assert not (tmp_path / "run" / "sft").exists()


REJECTING = (
    "trainer.callbacks=[{{class_path: tulu_lightning.callbacks.records.Records}}, "
    "{{class_path: tulu_lightning.callbacks.checkpoints.Checkpoints}}, "
    "{{class_path: tulu_lightning.callbacks.evaluate.Evaluate, init_args: {{max_new_tokens: 2, sources: "
    "[{{name: held-out, rows: tulu_lightning.assets.arithmetic.heldout_rows, args: {{count: 8}}}}]}}}}, "
    "{{class_path: tulu_lightning.callbacks.promote.Promote}}]"
)
"""A random model gains nothing on sums, and without a rule a gain is asked for."""


@pytest.mark.parametrize("on_reject", ["stop", "continue"])
def test_a_stage_that_gains_nothing_is_not_promoted(on_reject, tmp_path, capsys):
    first = {"name": "sft", "fit": str(CONFIGS / "sft_tiny.yaml"), "set": [REJECTING]}
    # A later config's own start, of some other run, must not come in by the back door.
    elsewhere = ["model.init_args.backbone.path=elsewhere/promoted"]
    second = {"name": "dpo", "fit": str(CONFIGS / "dpo_tiny.yaml"), "set": elsewhere}
    command = recipe(tmp_path, first, second, on_reject=on_reject)
    run = tmp_path / "run"
    if on_reject == "stop":
        with pytest.raises(InputError, match="was not promoted"):
            main(command)
        assert not (run / "dpo").exists()
    else:
        assert main(command) == 0
        assert summary(run, "dpo")["start"] == summary(run, "sft")["start"]
    said = capsys.readouterr().out
    assert (f"sft was not promoted; going on from {resolve_model('tiny-random-llama')}" in said) == (
        on_reject == "continue"
    )
    assert f"report: {run / 'report.html'}" in said, "also of a recipe that stops there"
    assert (run / "report.html").stat().st_size > 0
    assert summary(run, "sft")["promoted"] is False
    assert not (run / "sft" / "promoted").exists()
    assert json.loads((run / "sft" / "scores" / "after.json").read_text())["summary"]["n"] == 8
