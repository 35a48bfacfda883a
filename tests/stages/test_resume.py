"""A run that was stopped and run again is the run that was never stopped, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from stage_faults import Interrupt
from stage_runs import STAGES, fit

from tulu_lightning import cli
from tulu_lightning.callbacks.checkpoints import checkpoint_path

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS, STOP = 5, 2


def records(folder):
    """The lines of metrics.jsonl without what the clock and the machine put there."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    own = ("time", "mfu", "peak_memory_bytes")
    return [{k: v for k, v in row.items() if k not in own and "second" not in k} for row in rows]


def assert_same(one, other):
    """Two nested states, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("name", STAGES)
def test_stopped_by_ctrl_c_and_resumed_is_never_stopped(name, tmp_path, capsys):
    build, data = STAGES[name]
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    whole = build()
    fit(whole, data(max_steps=STEPS), straight)

    before = signal.getsignal(signal.SIGINT)
    half = build()
    fit(half, data(max_steps=STEPS), halves, callbacks=[Interrupt(STOP)])
    assert half.step == STOP, "the step in progress is finished, and none is begun"
    assert not half.finished
    assert signal.getsignal(signal.SIGINT) is before
    assert "finishing this step and saving it" in capsys.readouterr().out
    assert [path.name for path in (halves / "checkpoints").iterdir()] == [f"step-{STOP:06d}.ckpt"]

    torch.manual_seed(99)  # nothing of the resumed run may come from the random state it starts with
    resumed = build()
    watch = fit(resumed, data(max_steps=STEPS), halves, ckpt_path=checkpoint_path(halves, STOP))
    assert len(watch.history) == STEPS - STOP
    assert_same(whole.state_dict(), resumed.state_dict())
    optimizers = [[o.state_dict() for o in stage.trainer.optimizers] for stage in (whole, resumed)]
    assert_same(*optimizers)
    assert [row["step"] for row in records(halves)] == list(range(1, STEPS + 1))
    assert records(halves) == records(straight)


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    build, data = STAGES["sft"]
    stage = build()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(stage, data(max_steps=STEPS), tmp_path, callbacks=[Interrupt(STOP), Interrupt(STOP)])
    assert stage.step == STOP - 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored


def config(tmp_path, name, *callbacks):
    """The shipped tiny SFT, saved after every step of 6 rows (16 steps), with further callbacks."""
    path = tmp_path / f"{name}.yaml"
    own = "tulu_lightning.callbacks."
    settings = {
        "include": [str(CONFIGS / "sft_tiny.yaml")],
        "data": {"init_args": {"examples_per_step": 12}},
        "trainer": {
            "default_root_dir": str(tmp_path / "run"),
            "callbacks": [
                {"class_path": own + "records.Records"},
                *callbacks,
                {"class_path": own + "checkpoints.Checkpoints", "init_args": {"every_n_steps": 1, "keep": 2}},
                {"class_path": own + "promote.Promote"},
            ],
        },
    }
    path.write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(path)]


def tulu(argv):
    """The command in a process of its own, with as many threads: the number decides the order of sums."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(
        [sys.executable, "-m", "tulu_lightning", *argv], capture_output=True, text=True, env=environment, check=False
    )


def test_killed_while_saving_and_run_again_is_never_killed(tmp_path, capsys):
    (tmp_path / "straight").mkdir()
    assert cli.main(config(tmp_path / "straight", "sft")) == 0
    fault = {"class_path": "stage_faults.DieWhileSaving", "init_args": {"step": 5}}
    assert tulu(config(tmp_path, "sft", fault)).returncode == -signal.SIGKILL
    run = tmp_path / "run"
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == [".step-000005.ckpt.tmp", "step-000003.ckpt", "step-000004.ckpt"]
    assert not (run / "summary.json").exists()
    (run / "checkpoints" / ".step-000002.ckpt.tmp").write_bytes(b"half a file of another kill")

    capsys.readouterr()
    assert cli.main(config(tmp_path, "sft")) == 0
    assert "resuming from" in (out := capsys.readouterr().out)
    assert "(step 4)" in out
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["step-000007.ckpt", "step-000008.ckpt"]
    straight = tmp_path / "straight" / "run"
    assert_same(*(load_file(folder / "promoted" / "model.safetensors") for folder in (straight, run)))
    assert records(run) == records(straight)
    assert [row["step"] for row in records(run)] == list(range(1, 9))


def test_ctrl_c_during_tulu_fit_ends_with_130_says_how_to_go_on_and_goes_on(tmp_path, capsys):
    fault = {"class_path": "stage_faults.Interrupt", "init_args": {"step": 3}}
    assert cli.main(config(tmp_path, "sft", fault)) == 130
    said = capsys.readouterr()
    assert "finishing this step and saving it" in said.out
    assert said.err.endswith("tulu: interrupted; run the same command again to go on\n")
    assert not (tmp_path / "run" / "summary.json").exists()
    assert cli.main(config(tmp_path, "sft")) == 0
    assert "(step 3)" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 8


def test_ctrl_c_in_the_last_step_still_finishes_the_run(tmp_path):
    fault = {"class_path": "stage_faults.Interrupt", "init_args": {"step": 8}}
    assert cli.main(config(tmp_path, "sft", fault)) == 0
    assert (tmp_path / "run" / "summary.json").exists()
