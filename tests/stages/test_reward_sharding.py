"""The reward model on two CPU processes under `strategy: fsdp2` is that on one; a rank may hold nothing of its head."""

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_sharding import CONFIGS, lines, two_processes
from transformers import AutoModelForSequenceClassification

from tulu_lightning import cli


def config(folder):
    folder.mkdir()
    own = "tulu_lightning.callbacks."
    settings = {
        "include": [str(CONFIGS / "reward_tiny.yaml")],
        "data": {"init_args": {"examples_per_step": 12, "micro_tokens": 200, "max_steps": 4}},
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "callbacks": [
                {"class_path": own + "records.Records"},
                {"class_path": own + "checkpoints.Checkpoints"},
                {"class_path": own + "promote.Promote"},
            ],
        },
    }
    path = folder / "reward.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(path)]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    assert cli.main(config(tmp_path / "one")) == 0
    done = two_processes(config(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    one, two = (tmp_path / name / "run" for name in ("one", "two"))
    assert len(lines(one)) == 4
    for single, sharded in zip(lines(one), lines(two), strict=True):
        for key in ("loss", "grad_norm", "lr", "pairs", "tokens", "trained_tokens", "accuracy", "length_chosen"):
            assert sharded[key] == pytest.approx(single[key], rel=1e-4), (single["step"], key)
        for key in ("margin", "rewards_chosen", "margin/additions"):
            assert sharded[key] == pytest.approx(single[key], rel=2e-4, abs=1e-4), (single["step"], key)
    single, sharded = (load_file(run / "promoted" / "model.safetensors") for run in (one, two))
    assert single.keys() == sharded.keys()
    assert single["score.weight"].shape == (1, 256)
    for name, tensor in single.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-4, atol=1e-4, msg=name)
    model = AutoModelForSequenceClassification.from_pretrained(two / "promoted")
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()
