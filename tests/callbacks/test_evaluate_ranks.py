"""A suite that is scored while two processes train: their answers are those of one, and training does not notice."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tulu_lightning import cli

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
OWN = "tulu_lightning.callbacks."
MOMENTS = ("before", "step_000002", "after")


def config(folder, evaluates):
    """The shipped tiny SFT in 4 steps, scored on two tasks and on held-out prompts, or not at all."""
    folder.mkdir(exist_ok=True)
    sums = {"name": "sums", "rows": "tulu_lightning.assets.arithmetic.heldout_rows", "args": {"count": 7}}
    evaluate = {
        "class_path": OWN + "evaluate.Evaluate",
        "init_args": {
            "sources": [sums],
            "max_new_tokens": 4,
            "every_n_steps": 2,
            "suite": {"tasks": ["toy_tasks.ASKED", "toy_tasks.RANKED"], "limit": 9, "limits": {"ranked": 5}},
        },
    }
    lenient = {"when": "each", "rule": {"max_loss": 0.9, "min_items": 1}}
    settings = {
        "include": [str(CONFIGS / "sft_tiny.yaml")],
        "model": {"init_args": {"optimizer": {"lr": 1.0e-2, "eps": 1.0e-2}}},
        "data": {"init_args": {"examples_per_step": 12, "max_steps": 4, "micro_tokens": 200}},
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "callbacks": [
                {"class_path": OWN + "records.Records"},
                {"class_path": "noticing.Notice"},
                {"class_path": OWN + "checkpoints.Checkpoints"},
                *([evaluate] if evaluates else []),
                {"class_path": OWN + "promote.Promote", "init_args": lenient if evaluates else {}},
            ],
        },
    }
    path = folder / "sft.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(path)]


def two_processes(argv):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "-m", "tulu_lightning"]
    sharded = ["--trainer.strategy", "fsdp2", "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", *launch, *argv, *sharded],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Run folders: two processes with and without an evaluation, and one process with it; and what the first said."""
    root = tmp_path_factory.mktemp("ranks")
    said = two_processes(config(root / "scored", True))
    two_processes(config(root / "alone", False))
    assert cli.main(config(root / "one", True)) == 0
    return *(root / name / "run" for name in ("scored", "alone", "one")), said


def read(path):
    return json.loads(path.read_text())


def noticed(run, rank):
    return [json.loads(line) for line in (run / f"noticed-{rank}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("rank", [0, 1])
def test_random_states_and_batches_of_each_rank_are_as_without_it(folders, rank):
    scored, alone, *_ = folders
    assert [row["step"] for row in noticed(scored, rank)] == [0, 1, 2, 3]
    assert noticed(scored, rank) == noticed(alone, rank)
    assert noticed(scored, 0)[0]["rows"] != noticed(scored, 1)[0]["rows"]


def test_the_trained_weights_are_those_of_a_run_without_it(folders):
    scored, alone, *_ = folders
    one, other = (load_file(run / "exports" / "step-000004" / "model.safetensors") for run in (scored, alone))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_answers_are_those_of_one_process(folders, moment):
    scored, _, one, _ = folders
    for path in (f"{moment}.json", f"{moment}/asked.json", f"{moment}/ranked.json"):
        here, there = (read(run / "scores" / path) for run in (scored, one))
        assert here["settings"] == there["settings"]
        assert here["summary"]["n"] == there["summary"]["n"]
        assert [item.get("key", item.get("row")) for item in here["items"]] == [
            item.get("key", item.get("row")) for item in there["items"]
        ]
        if moment == "before":  # later the weights differ by rounding
            assert [item["score"] for item in here["items"]] == [item["score"] for item in there["items"]]
            assert here["summary"]["interval"] == there["summary"]["interval"]


def test_each_item_is_asked_once_and_the_files_are_whole(folders):
    scored, *_, said = folders
    sizes = {"asked": 9, "ranked": 5}
    for task, n in sizes.items():
        result = read(scored / "scores" / "step_000002" / f"{task}.json")
        assert len({item["key"] for item in result["items"]}) == result["summary"]["n"] == n
        assert all(len(item["answers"]) == (2 if task == "asked" else 1) for item in result["items"])
    assert read(scored / "scores" / "step_000002.json")["summary"]["n"] == 7
    assert [path.name for path in (scored / "scores").rglob(".*")] == [], "sheets of finished items are gone"
    assert said.stdout.count("step_000002: asked") == 1, "one rank speaks"


def test_each_look_is_decided_on_once_and_exported_by_both(folders):
    scored, _, one, _ = folders
    for step in (2, 4):
        here, there = (read(run / "promotions" / f"step-{step:06d}.json") for run in (scored, one))
        assert here["decision"]["promote"]
        assert here["decision"]["level"] == there["decision"]["level"] == pytest.approx(0.025)
        assert here["identity"] == there["identity"]
        weights = [load_file(run / "exports" / f"step-{step:06d}" / "model.safetensors") for run in (scored, one)]
        for name, tensor in weights[1].items():
            torch.testing.assert_close(weights[0][name], tensor, rtol=1e-4, atol=1e-4)
    assert os.readlink(scored / "promoted") == "exports/step-000004"
    chain = read(scored / "promoted" / "lineage.json")
    assert [(entry["stage"], entry["step"]) for entry in chain] == [("SFT", 4)]
    assert "held-out" in chain[0]["scores"]
