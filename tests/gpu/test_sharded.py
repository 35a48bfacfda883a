"""FSDP2 over NCCL, on the one GPU that is there, with and without the host as its memory."""

import json

import pytest
import yaml
from test_sharding import CONFIGS

from tulu_lightning import cli

pytestmark = pytest.mark.gpu
OFFLOAD = {"class_path": "tulu_lightning.models.sharding.Fsdp2", "init_args": {"cpu_offload": True}}


def metrics(folder, stage, strategy, accelerator, **backbone):
    folder.mkdir()
    own = "tulu_lightning.callbacks."
    trainer = {"default_root_dir": str(folder / "run"), "accelerator": accelerator, "devices": 1, "logger": False}
    trainer["callbacks"] = [{"class_path": own + "records.Records"}]
    if stage in ("ppo", "grpo"):
        trainer["callbacks"].insert(0, {"class_path": own + "refresh.RolloutRefresh"})
    if strategy is not None:
        trainer["strategy"] = strategy
    settings = {
        "include": [str(CONFIGS / f"{stage}_tiny.yaml")],
        "data": {"init_args": {"max_steps": 3}},
        "model": {"init_args": {"backbone": backbone}},
        "trainer": trainer,
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(settings))
    assert cli.main(["fit", "--config", str(folder / "own.yaml")]) == 0
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "ppo", "grpo"])
@pytest.mark.parametrize("strategy", ["fsdp2", OFFLOAD], ids=["sharded", "offloaded"])
def test_sharded_on_one_gpu_is_whole(stage, strategy, tmp_path, accelerator):
    if accelerator != "gpu" and strategy is OFFLOAD:
        pytest.skip("a CPU has nothing to offload from")
    whole = metrics(tmp_path / "whole", stage, None, accelerator)
    found = metrics(tmp_path / "sharded", stage, strategy, accelerator)
    assert len(found) == len(whole) == 3
    for step in range(3 if stage in ("sft", "dpo", "reward") else 1):
        for key in ("loss", "grad_norm"):
            if key in whole[step]:
                assert found[step][key] == pytest.approx(whole[step][key], rel=1e-3, abs=1e-6), (step, key)


@pytest.mark.parametrize("strategy", ["fsdp2", OFFLOAD], ids=["sharded", "offloaded"])
def test_bf16_under_sharding(strategy, tmp_path, accelerator):
    if accelerator != "gpu" and strategy is OFFLOAD:
        pytest.skip("a CPU has nothing to offload from")
    more = {"compute_dtype": "bfloat16", "activation_checkpointing": True}
    whole = metrics(tmp_path / "whole", "sft", None, accelerator, **more)
    found = metrics(tmp_path / "sharded", "sft", strategy, accelerator, **more)
    assert [x["loss"] for x in found] == pytest.approx([x["loss"] for x in whole], rel=1e-2)
