"""SIGKILL at any moment, then the same command again: the weights are those of a run that nobody disturbed, bit for bit."""

import json
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[2] / "configs"
OWN = "tulu_lightning.callbacks."
HERE = Path(__file__).parent
STAGES = ("sft", "sft beside", "reward", "dpo", "ppo", "grpo", "ppo ahead")
"""`beside`: checkpoints are written in the background; `ahead`: a batch is sampled while another is learned from."""
SAMPLES = ("ppo", "grpo", "ppo ahead")


def config(folder, name, steps=6):
    """The shipped tiny run of a stage, saved after every step, in some more steps."""
    folder.mkdir(parents=True, exist_ok=True)
    stage = name.split()[0]
    refresh = [{"class_path": OWN + "refresh.RolloutRefresh"}] if stage in SAMPLES else []
    saving = {"every_n_steps": 1, "keep": 2, "background": name == "sft beside"}
    settings = {
        "include": [str(CONFIGS / f"{stage}_tiny.yaml")],
        "data": {"init_args": {"examples_per_step": 8, "max_steps": steps}},
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "logger": False,
            "callbacks": [
                {"class_path": OWN + "records.Records"},
                *refresh,
                {"class_path": OWN + "checkpoints.Checkpoints", "init_args": saving},
                {"class_path": OWN + "promote.Promote"},
            ],
        },
    }
    if name == "ppo ahead":
        settings["model"] = {"init_args": {"rollout": {"staleness": 1}}}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(path)], folder / "run"


def recipe(folder, name):
    """The shipped tiny recipe: SFT, DPO, PPO."""
    folder.mkdir(parents=True, exist_ok=True)
    run = folder / "run"
    return ["recipe", "--config", str(CONFIGS / "recipes/tiny.yaml"), "--run", str(run)], run


def served(argv, run, folder, kills, seed, aims, longest):
    """Run a command in the kill server. Returns where each kill fell."""
    log = folder / "log.txt"
    asked = {
        "argv": argv,
        "folder": str(run),
        "log": str(log),
        "kills": kills,
        "seed": seed,
        "aims": aims,
        "longest": longest,
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TULU_REFERENCE": str(folder / "reference")}
    found = subprocess.run(
        [sys.executable, str(HERE / "kill_server.py")],
        input=json.dumps(asked) + "\n",
        capture_output=True,
        text=True,
        env=environment,
        timeout=1500,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    answer = json.loads(found.stdout.splitlines()[-1])
    assert answer["status"] == 0, log.read_text()[-3000:]
    return answer["kills"]


def weights(run):
    """The exported weights of a run, or of each stage of a recipe, as bytes."""
    files = sorted(run.glob("exports/*/model.safetensors")) or sorted(run.glob("*/exports/*/model.safetensors"))
    assert files, "the run exported nothing"
    return [path.read_bytes() for path in files]


def lines(run):
    """The steps in the record: each stands there once, in order."""
    return [
        [json.loads(line)["step"] for line in path.read_text().splitlines()]
        for path in sorted(run.glob("**/metrics.jsonl"))
    ]


def disturbed(tmp_path, name, build, kills, seed, aims, longest):
    """Where the kills fell of a run that ends like one without any."""
    argv, straight = build(tmp_path / "straight", name)
    assert served(argv, straight, tmp_path / "straight", 0, seed, ["any"], longest) == []
    fell: list[str] = []
    round = 0
    while len(fell) < kills:  # a run that came to its end before all kills were spent is followed by another one
        folder = tmp_path / f"killed {round}"
        argv, run = build(folder, name)
        fell += served(argv, run, folder, kills - len(fell), seed + round, aims, longest)
        assert weights(run) == weights(straight), (name, seed + round, fell)
        assert lines(run) == lines(straight), (name, seed + round, fell)
        round += 1
    return fell


def aims_of(name):
    return ["any", "save", "generation"] if name in SAMPLES or name == "recipe" else ["any", "save"]


@pytest.mark.parametrize(("name", "kills"), [("sft", 2), pytest.param("ppo", 3, marks=pytest.mark.slow)])
def test_killed_a_few_times(tmp_path, name, kills):
    fell = disturbed(tmp_path, name, partial(config, steps=4), kills, 1, aims_of(name)[::-1], 3.0)
    assert len(fell) >= kills
    assert "save" in fell
    if name == "ppo":
        assert "generation" in fell


ROWS = []
"""Of the tests below, in the order in which they ran."""


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "name"), list(enumerate((*STAGES, "recipe"), start=11)))
def test_killed_at_twenty_moments(tmp_path, seed, name):
    """Prints the table that docs/resuming.md shows, as far as it has come."""
    build = recipe if name == "recipe" else config
    longest = 12.0 if name == "recipe" else 5.0
    fell = disturbed(tmp_path / name, name, build, 20, seed, aims_of(name), longest)
    counts = Counter(fell)
    ROWS.append((name, len(fell), *(counts[place] for place in ("start", "step", "save", "generation"))))
    print(f"\n{'stage':14} {'kills':>6} {'start':>6} {'step':>6} {'save':>6} {'generation':>11}   weights")
    for stage, kills, *places in ROWS:
        print(f"{stage:14} {kills:>6} {places[0]:>6} {places[1]:>6} {places[2]:>6} {places[3]:>11}   equal")
    assert len(fell) >= 20
    assert counts["save"] >= 3
