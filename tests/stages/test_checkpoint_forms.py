"""A checkpoint goes on as any form of itself: a file, a folder of 2 or 4 ranks; same examples, same weights, same numbers."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_sharding import CONFIGS, lines, two_processes

from tulu_lightning import cli

OWN = "tulu_lightning.callbacks."
STEPS, STOP = 6, 3


def config(folder, stage, *callbacks, data=None, **model):
    """The shipped tiny run of a stage in 6 steps, each saved; a large eps, so that rounding decides no update's sign."""
    folder.mkdir(parents=True, exist_ok=True)
    refresh = [{"class_path": OWN + "refresh.RolloutRefresh"}] if stage == "ppo" else []
    optimizer = {"lr": 1e-2, "eps": 1e-2}
    settings = {
        "include": [str(CONFIGS / f"{stage}_tiny.yaml")],
        "model": {"init_args": {"optimizer": optimizer, **model}},
        "data": {"init_args": {"examples_per_step": 8, "max_steps": STEPS, **(data or {})}},
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "logger": False,
            "callbacks": [
                {"class_path": OWN + "records.Records"},
                *refresh,
                {"class_path": "stage_faults.KeepRows"} if stage != "ppo" else None,
                *callbacks,
                {"class_path": OWN + "checkpoints.Checkpoints", "init_args": {"every_n_steps": STOP, "keep": 2}},
                {"class_path": OWN + "promote.Promote"},
            ],
        },
    }
    settings["trainer"]["callbacks"] = [c for c in settings["trainer"]["callbacks"] if c]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(path)]


PREEMPT = {"class_path": "stage_faults.Interrupt", "init_args": {"step": STOP, "number": 15}}
STAGES = {
    "sft": {},
    "dpo": {},
    "reward": {},
    "ppo": {
        "critic": {"warmup_steps": 4, "optimizer": {"lr": 1e-2, "eps": 1e-2}},
        "rollout": {"staleness": 1, "samples_per_prompt": 4, "max_new_tokens": 6},
        "overlong": {"kind": "none"},
    },
}
EVEN = {"sources": [{"name": "even", "rows": "stage_runs.even_rows", "args": {"count": 40}}]}


def start(argv, ranks):
    """The command on so many processes: (status, what it said)."""
    if ranks == 1:
        done = two_processes(argv, 1, sharded=False)
    else:
        done = two_processes(argv, ranks)
    return done.returncode, done.stdout + done.stderr


def resumed(root, stage, first, then):
    """A run that is stopped on some ranks and goes on on others."""
    folder = root / f"{stage} {first} {then}"
    more = {"data": EVEN if stage == "ppo" else None, **STAGES[stage]}
    status, said = start(config(folder, stage, PREEMPT, **more), first)
    assert (folder / "run" / "checkpoints" / f"step-{STOP:06d}.ckpt").exists(), said
    assert status == (75 if first == 1 else 1), said  # torchrun gives its own
    status, said = start(config(folder, stage, **more), then)
    assert status == 0, said
    assert f"step-{STOP:06d}.ckpt (step {STOP})" in said
    return folder / "run"


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Undisturbed runs on one process, by stage."""
    root, found = tmp_path_factory.mktemp("straight"), {}

    def run(stage):
        if stage not in found:
            more = {"data": EVEN if stage == "ppo" else None, **STAGES[stage]}
            assert cli.main(config(root / stage, stage, **more)) == 0
            found[stage] = root / stage / "run"
        return found[stage]

    return run


def check(run, straight, stage, exact=False):
    one, other = (load_file(folder / "promoted" / "model.safetensors") for folder in (straight, run))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if exact:
            assert torch.equal(tensor, other[name]), name
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)
    assert [row["step"] for row in lines(run)] == list(range(1, STEPS + 1))
    for row, undisturbed in zip(lines(run), lines(straight), strict=True):
        for key in ("loss", "grad_norm", "tokens", "lr"):
            assert row[key] == pytest.approx(undisturbed[key], rel=1e-3, abs=1e-5), (row["step"], key)
    if stage != "ppo":
        rows = {}
        for path in run.glob("rows-*.jsonl"):
            for line in path.read_text().splitlines():
                record = json.loads(line)
                rows.setdefault(record["step"], set()).update(record["mine"])
        alone = {r["step"]: set(r["mine"]) for r in lines(straight, "rows-0.jsonl")}
        assert rows == alone, "the same examples in the same steps"


def test_a_file_goes_on_on_two_ranks_and_their_folder_on_one(tmp_path, straight):
    check(resumed(tmp_path, "sft", 1, 2), straight("sft"), "sft")
    check(resumed(tmp_path, "sft", 2, 1), straight("sft"), "sft")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, 1), (1, 2), (2, 1), (2, 2), (2, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("stage", STAGES)
def test_any_number_of_ranks_goes_on_from_any_other(tmp_path, straight, stage, first, then):
    check(resumed(tmp_path, stage, first, then), straight(stage), stage, exact=first == then == 1)
