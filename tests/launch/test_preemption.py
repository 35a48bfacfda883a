"""SIGTERM and SIGUSR1: a status that says "try again later", and a SLURM job that is queued again."""

import os
import signal
import sys
from pathlib import Path

import pytest
import yaml

from tulu_lightning import cli
from tulu_lightning.callbacks.checkpoints import Checkpoints
from tulu_lightning.errors import InputError, Preempted
from tulu_lightning.launch.preemption import preemptible, requeue

CONFIGS = Path(__file__).parents[2] / "configs"
OWN = "tulu_lightning.callbacks."
sys.path.append(str(Path(__file__).parents[1] / "stages"))  # configs name `stage_faults` by import path


def config(folder, *faults, **saving):
    settings = {
        "include": [str(CONFIGS / "sft_tiny.yaml")],
        "data": {"init_args": {"examples_per_step": 8, "max_steps": 3}},
        "trainer": {
            "logger": False,
            "default_root_dir": str(folder / "run"),
            "callbacks": [
                {"class_path": OWN + "records.Records"},
                *({"class_path": "stage_faults.Interrupt", "init_args": fault} for fault in faults),
                {"class_path": OWN + "checkpoints.Checkpoints", "init_args": {"every_n_steps": 0, **saving}},
                {"class_path": OWN + "promote.Promote"},
            ],
        },
    }
    path = folder / "sft.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A SLURM job with a `scontrol` that writes down what it is asked; `refuse` makes it fail."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "scontrol"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n[ ! -e {tmp_path}/refuse ] || {{ echo no right >&2; exit 1; }}\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    return tmp_path


def test_a_recipe_stops_with_the_same_status_has_its_job_queued_again_and_goes_on(slurm, capsys):
    twice = {"step": 2, "number": int(signal.SIGUSR1)}
    config(slurm, twice, {**twice, "number": int(signal.SIGTERM)}, requeue=True)
    recipe = slurm / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({"name": "one", "run": str(slurm / "all"), "stages": [{"name": "sft", "fit": "sft.yaml"}]})
    )
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    assert cli.main(["recipe", "--config", str(recipe)]) == 75
    said = capsys.readouterr()
    assert said.out.count("stopping: finishing this step and saving it") == 1, "two signals are as one"
    assert "SLURM job 4242 is queued again" in said.out
    assert said.err.endswith("tulu: stopped by a signal; run the same command again to go on\n")
    assert (slurm / "asked").read_text() == "requeue 4242\n"
    assert [p.name for p in (slurm / "all/sft/checkpoints").iterdir()] == ["step-000002.ckpt"]
    config(slurm, requeue=True)
    assert cli.main(["recipe", "--config", str(recipe)]) == 0
    assert "(step 2)" in capsys.readouterr().out
    assert (slurm / "asked").read_text() == "requeue 4242\n"
    assert {number: signal.getsignal(number) for number in before} == before


def test_ctrl_c_queues_nothing_again(slurm):
    path = config(slurm, {"step": 1}, requeue=True)
    assert cli.main(["fit", "--config", path]) == 130
    assert not (slurm / "asked").exists()


def test_a_job_that_slurm_refuses_is_told(slurm, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    (slurm / "refuse").touch()
    requeue()
    assert (slurm / "asked").read_text() == "requeue 77_3\n"
    assert "SLURM job 77_3 was not queued again (no right); submit it again by hand" in capsys.readouterr().err


def test_queueing_again_outside_of_slurm_is_refused(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(InputError, match=r"Checkpoints\.requeue: is true, and this is no SLURM job"):
        Checkpoints(requeue=True)


def test_a_signal_outside_of_training_ends_the_command_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="SIGTERM"), preemptible():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_forked_child_ends_by_the_signal_and_not_in_its_parents_words():
    with preemptible():
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
