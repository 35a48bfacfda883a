"""SFT on two CPU processes under `strategy: fsdp2` is SFT on one."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from stage_runs import sft
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from tulu_lightning import cli
from tulu_lightning.errors import InputError

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS, STOP = 8, 3


def config(folder, *callbacks):
    """The shipped tiny SFT in 8 steps; a pass holds a few rows, so that a rank has several."""
    folder.mkdir(exist_ok=True)
    own = "tulu_lightning.callbacks."
    settings = {
        "include": [str(CONFIGS / "sft_tiny.yaml")],
        "data": {"init_args": {"examples_per_step": 12, "micro_tokens": 200}},
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "callbacks": [
                {"class_path": own + "records.Records"},
                {"class_path": "stage_faults.KeepRows"},
                *callbacks,
                {"class_path": own + "checkpoints.Checkpoints", "init_args": {"every_n_steps": 4, "keep": 2}},
                {"class_path": own + "promote.Promote"},
            ],
        },
    }
    path = folder / "sft.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(path)]


def two_processes(argv, count=2, sharded=True):
    """The command under torchrun; one process that is not sharded runs by itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = ["torch.distributed.run", "--nproc-per-node", str(count), "--master-port", port, "-m", "tulu_lightning"]
    options = ["--trainer.strategy", "fsdp2", "--trainer.devices", str(count), "--trainer.accelerator", "cpu"]
    if not sharded:
        launch, options = ["tulu_lightning"], []
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *launch, *argv, *options],
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process; and two, stopped by a signal that reaches one of them only, then run again."""
    root = tmp_path_factory.mktemp("sharding")
    assert cli.main(config(root / "one")) == 0
    fault = {"class_path": "stage_faults.Interrupt", "init_args": {"step": STOP, "rank": 1}}
    stopped = two_processes(config(root / "two", fault))
    checkpoint = root / "two" / "run" / "checkpoints" / f"step-{STOP:06d}.ckpt"
    sizes = sharded_sizes(checkpoint) if checkpoint.exists() else {}
    resumed = two_processes(config(root / "two"))
    return root / "one" / "run", root / "two" / "run", stopped, sizes, resumed


def sharded_sizes(checkpoint):
    """For each tensor in a directory checkpoint, the number of elements that each rank wrote."""
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {name: [chunk.sizes.numel() for chunk in m.chunks] for name, m in metadata.items() if hasattr(m, "chunks")}


def lines(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_one_ranks_signal_stops_both_after_the_same_step(runs):
    *_, stopped, _, _ = runs
    assert stopped.returncode != 0
    assert stopped.stderr.count("tulu: interrupted; run the same command again to go on") == 2
    assert "Traceback" not in stopped.stderr.split("tulu: interrupted")[0]


def test_parameters_and_optimiser_state_are_really_sharded(runs):
    _, _, _, sizes, _ = runs
    weights = {name: parts for name, parts in sizes.items() if name.startswith("state_dict.policy")}
    moments = {name: parts for name, parts in sizes.items() if name.endswith(("exp_avg", "exp_avg_sq"))}
    assert weights
    assert len(moments) == 2 * len(weights) - 2, "the output head is tied to the embedding"
    for parts in (*weights.values(), *moments.values()):
        assert len(parts) == 2
        assert parts[0] == parts[1], "every dimension of the tiny model is even"


def test_a_directory_checkpoint_resumes(runs):
    *_, resumed = runs
    assert resumed.returncode == 0, resumed.stderr
    assert f"step-{STOP:06d}.ckpt (step {STOP})" in resumed.stdout


def test_losses_gradient_norms_and_rows_are_those_of_one_process(runs):
    one, two, *_ = runs
    assert [row["step"] for row in lines(two)] == list(range(1, STEPS + 1))
    for single, sharded in zip(lines(one), lines(two), strict=True):
        for key in ("loss", "grad_norm", "lr", "tokens", "trained_tokens"):
            assert sharded[key] == pytest.approx(single[key], rel=1e-5), (single["step"], key)
    single, *ranks = (
        {row["step"]: row for row in lines(run, name)}
        for run, name in ((one, "rows-0.jsonl"), (two, "rows-0.jsonl"), (two, "rows-1.jsonl"))
    )
    for step in range(STEPS):
        shares = [set(rank[step]["mine"]) for rank in ranks]
        assert shares[0] | shares[1] == set(single[step]["mine"]) == set(ranks[0][step]["step_rows"])
        assert shares[0]
        assert shares[1]
        assert not shares[0] & shares[1]
        assert ranks[0][step]["passes"] == ranks[1][step]["passes"]


def test_the_promoted_export_is_that_of_one_process_and_loads(runs):
    one, two, *_ = runs
    single, sharded = (load_file(run / "promoted" / "model.safetensors") for run in (one, two))
    assert single.keys() == sharded.keys()
    for name, tensor in single.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-5, atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(two / "promoted")
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_one_rank_speaks(runs):
    *_, resumed = runs
    assert resumed.stdout.count("resuming from") == 1
    assert resumed.stdout.count("promoted:") == 1
    assert len(re.findall(rf"^SFT +{STEPS}/{STEPS} ", resumed.stderr, re.MULTILINE)) == 1


def test_a_strategy_that_would_average_micro_batches_is_refused():
    stage = sft()
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    stage.trainer = trainer
    with pytest.raises(InputError, match=r"^trainer\.strategy: is DDPStrategy with 2 processes\. Use fsdp2"):
        stage.setup("fit")
