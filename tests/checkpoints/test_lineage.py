"""From a checkpoint back to the base model: folders and records as a run leaves them, with made-up weights."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tulu_lightning import cli
from tulu_lightning.checkpoints.identity import weights_digest
from tulu_lightning.checkpoints.lineage import chain
from tulu_lightning.checkpoints.promoted import export_folder, move, record_path, write_record
from tulu_lightning.errors import InputError


def weights(folder, value):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.full((3,), float(value))}, folder / "model.safetensors")
    return folder


def stage(run, parent, step, value, promote=True, start=None):
    """A run folder with one decision; `start` is how its config named the parent."""
    export = weights(export_folder(run, step), value)
    (run / "metrics.jsonl").write_text("")
    verdict = {"task": "held-out", "role": "gain", "difference": 0.2, "low": 0.1, "high": 0.3}
    record = {
        "run": str(run),
        "stage": run.name.upper(),
        "step": step,
        "steps_planned": 20,
        "time": "2026-01-02T03:04:05+0000",
        "decision": {"promote": promote, "reason": "it rose", "verdicts": [verdict]},
        "scores": {
            "before": {"held-out": {"score": 0.3, "low": 0.25, "high": 0.35, "n": 200}},
            "after": {"held-out": {"score": 0.5, "low": 0.45, "high": 0.55, "n": 200}},
        },
        "export": f"exports/step-{step:06d}",
        "weights": weights_digest(export),
        "parent": {
            "path": str(start or parent),
            "folder": str(parent.resolve()),
            "relative": os.path.relpath(parent.resolve(), run.resolve()),
            "weights": weights_digest(parent),
        },
        "cost": {"steps": step, "seconds": 90.0, "tokens": 12_300, "trained_tokens": 400},
    }
    record = write_record(record_path(run, step), record)
    if promote:
        move(run, record)
    return export


@pytest.fixture
def recipe(tmp_path):
    """A base model and two stages on it, in the folder of a recipe."""
    base = weights(tmp_path / "base", 0)
    run = tmp_path / "run"
    (run / "sft").mkdir(parents=True)
    (run / "dpo").mkdir()
    (run / "recipe.json").write_text(json.dumps({"stages": ["sft", "dpo"]}))
    shutil.move(base, run / "base")  # inside, so that the whole can be moved
    stage(run / "sft", run / "base", 10, 1, start="org/base-model")
    stage(run / "dpo", run / "sft" / "promoted", 20, 2)
    return run


def names(found):
    return [(link.name, None if link.record is None else link.record["step"]) for link in found.links]


WHOLE = [("org/base-model", None), ("sft", 10), ("dpo", 20)]


@pytest.mark.parametrize("folder", ["", "dpo", "dpo/promoted", "dpo/exports/step-000020"])
def test_a_chain_goes_back_to_the_base_model(folder, recipe):
    found = chain(recipe / folder)
    assert names(found) == WHOLE
    assert found.broken == ""
    assert names(chain(recipe / "sft")) == WHOLE[:2]
    assert names(chain(recipe / "base")) == [(str(recipe / "base"), None)]


def test_a_copy_of_a_stage_is_none_of_the_recipes(recipe):
    shutil.copytree(recipe / "sft", recipe / "sft_old", symlinks=True)
    assert names(chain(recipe)) == WHOLE


def test_runs_without_a_recipe_go_by_name(recipe):
    (recipe / "recipe.json").unlink()
    assert names(chain(recipe))[-1] == ("sft", 10)


def test_a_run_that_was_moved_as_a_whole_still_knows(recipe, tmp_path):
    moved = tmp_path / "elsewhere"
    recipe.rename(moved)
    assert names(chain(moved)) == WHOLE
    assert chain(moved).broken == ""


def test_an_export_that_was_taken_along_still_knows(recipe, tmp_path):
    copied = shutil.copytree(recipe / "dpo" / "promoted", tmp_path / "copied")
    assert names(chain(copied)) == WHOLE


def test_the_command_prints_gains_and_cost(recipe, capsys):
    assert cli.main(["lineage", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0].startswith("org/base-model  (weights ")
    assert "└ sft: SFT, 10 steps of 20, 1m30s, 12.3k tokens (400 trained)" in said
    assert "held-out 30.0 → 50.0 [45.0, 55.0], gain +20.0 [+10.0, +30.0], n = 200" in said
    assert said.splitlines()[-1] == "in all: 30 steps, 3m00s, 24.6k tokens (800 trained)"


def test_the_command_gives_the_records_as_json(recipe, capsys):
    assert cli.main(["lineage", str(recipe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["broken"] is None
    assert [link["name"] for link in found["links"]] == [name for name, _ in WHOLE]
    assert found["links"][2]["record"]["parent"]["weights"] == found["links"][1]["weights"]


def test_an_export_without_a_record_is_no_base_model(recipe, tmp_path, capsys):
    """`tulu export` writes what it knows into lineage.json; nobody decided on it, and it started from something."""
    out = weights(tmp_path / "out", 5)
    entries = [{"stage": "SFT", "step": 10, "start": "org/base-model"}, {"stage": "DPO", "step": 20, "start": "x"}]
    (out / "lineage.json").write_text(json.dumps(entries))
    assert cli.main(["lineage", str(out)]) == 2
    said = "its lineage.json says org/base-model → SFT (10 steps) → DPO (20 steps)"
    assert said in capsys.readouterr().err
    stage(tmp_path / "run", out, 3, 4)
    found = chain(tmp_path / "run")
    assert names(found) == [(str(out), None), ("run", 3)]
    assert said in found.broken


def test_a_start_that_is_gone_is_named(recipe, capsys):
    shutil.rmtree(recipe / "sft")
    assert cli.main(["lineage", str(recipe / "dpo")]) == 2
    said = capsys.readouterr()
    assert "└ dpo: DPO, 20 steps" in said.out, "what there is of it"
    assert "sft/promoted (weights " in said.err
    assert "is missing: there is no " in said.err
    assert "sft/exports/step-000010" in said.err
    found = chain(recipe / "dpo")
    assert names(found) == [("dpo", 20)]


def test_a_start_with_other_weights_is_named(recipe):
    save_file({"w": torch.ones(3) * 7}, recipe / "sft" / "exports" / "step-000010" / "model.safetensors")
    found = chain(recipe / "dpo")
    assert names(found) == [("dpo", 20)]
    assert "sft/exports/step-000010 holds other weights now" in found.broken
    assert "holds other weights than its record says" in chain(recipe / "sft").broken


def test_a_record_that_is_gone_is_named(recipe):
    record_path(recipe / "sft", 10).unlink()
    (recipe / "sft" / "exports" / "step-000010" / "promotion.json").unlink()
    found = chain(recipe / "dpo")
    assert names(found)[1:] == [("dpo", 20)]
    assert "sft/promotions/step-000010.json is missing" in found.broken


def test_a_record_that_was_changed_is_refused(recipe):
    path = recipe / "dpo" / "exports" / "step-000020" / "promotion.json"
    path.write_text(path.read_text().replace("it rose", "it soared"))
    with pytest.raises(InputError, match="was changed after it was written"):
        chain(recipe / "dpo")


def test_a_folder_that_is_nothing_of_this_is_refused(recipe, tmp_path):
    with pytest.raises(InputError, match="there is no such folder"):
        chain(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither a checkpoint nor a run"):
        chain(tmp_path / "empty")
    rejected = recipe / "rejected"
    rejected.mkdir()
    stage(rejected, recipe / "base", 5, 3, promote=False)
    with pytest.raises(InputError, match=r"nothing in it was promoted \(rejected: it rose\)"):
        chain(rejected)
    assert names(chain(rejected / "exports" / "step-000005")) == [(str(recipe / "base"), None), ("rejected", 5)]
