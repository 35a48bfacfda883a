"""DPO on two CPU processes under `strategy: fsdp2` is DPO on one, with the reference cached and live."""

import pytest
import torch
import yaml
from safetensors.torch import load_file
from stage_runs import ROWS, TINY
from test_sharding import lines, two_processes

from tulu_lightning import cli

STEPS, STOP = 3, 1
SAME = ("loss", "margin", "accuracy", "grad_norm", "kl_chosen", "logp_rejected", "tokens", "pairs", "loss/sums")


def config(folder, reference, *callbacks):
    folder.mkdir(parents=True, exist_ok=True)
    own = "tulu_lightning.callbacks."
    settings = {
        "model": {
            "class_path": "tulu_lightning.stages.dpo.DPO",
            "init_args": {"backbone": {"path": TINY}, "optimizer": {"lr": 1e-3}, "reference": reference},
        },
        "data": {
            "class_path": "tulu_lightning.data.preference.PreferenceData",
            "init_args": {
                "sources": [{"name": "sums", "rows": f"{ROWS}pair_rows", "args": {"count": 21}}],
                "template": "tulu", "max_tokens": 256, "examples_per_step": 7, "micro_tokens": 160,
            },
        },
        "trainer": {
            "default_root_dir": str(folder / "run"), "accelerator": "cpu", "max_epochs": 1, "logger": False,
            "enable_checkpointing": False, "enable_progress_bar": False, "use_distributed_sampler": False,
            "callbacks": [
                {"class_path": own + "records.Records"},
                *callbacks,
                {"class_path": own + "checkpoints.Checkpoints", "init_args": {"every_n_steps": 0}},
                {"class_path": own + "promote.Promote"},
            ],
        },
        "ckpt_path": "auto",
    }  # fmt: skip
    path = folder / "dpo.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(path)]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process; two with a cache, stopped after a step and run again without the cache; two with a live reference."""
    root = tmp_path_factory.mktemp("dpo")
    fault = {"class_path": "stage_faults.Interrupt", "init_args": {"step": STOP, "rank": 1}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TULU_REFERENCE", str(root / "reference of one"))
        assert cli.main(config(root / "one", "cached")) == 0
        patch.setenv("TULU_REFERENCE", str(root / "reference of two"))
        first = two_processes(config(root / "two", "cached", fault))
        (root / "reference of two").rename(root / "kept")
        second = two_processes(config(root / "two", "cached"))
        assert not (root / "reference of two").exists()
        live = two_processes(config(root / "live", "live"))
    return root, first, second, live


def test_they_end_as_they_should(runs):
    _, first, second, live = runs
    assert "interrupted; run the same command again" in first.stderr
    assert second.returncode == 0, second.stderr
    assert live.returncode == 0, live.stderr
    assert first.stderr.count("reference: 21 pairs") == 1, "one rank speaks"


def test_both_ranks_computed_what_one_process_did(runs):
    root, *_ = runs
    one, two = (next((root / name).glob("*/*/logps.bin")).read_bytes() for name in ("reference of one", "kept"))
    one, two = (torch.frombuffer(bytearray(content), dtype=torch.float32) for content in (one, two))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["two", "live"])
def test_steps_and_export_are_those_of_one_process(runs, name):
    root, *_ = runs
    one, two = (lines(root / run / "run") for run in ("one", name))
    assert [row["step"] for row in two] == list(range(1, STEPS + 1))
    for single, sharded in zip(one, two, strict=True):
        for key in SAME:
            if key == "accuracy" and single["step"] == 1:
                continue  # policy and reference are one: which reward is above 0 is rounding
            assert sharded[key] == pytest.approx(single[key], rel=1e-4, abs=1e-5), (single["step"], key)
    single, sharded = (load_file(root / run / "run" / "promoted" / "model.safetensors") for run in ("one", name))
    assert single.keys() == sharded.keys()
    for key, tensor in single.items():
        torch.testing.assert_close(sharded[key], tensor, rtol=1e-4, atol=1e-4)
