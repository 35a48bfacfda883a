"""Adapters over a base in 4 bits, by AdamW with moments in 8: all stages, resumed bit for bit, and on two processes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import stage_runs as runs
import torch
import yaml
from safetensors.torch import load_file
from stage_faults import Interrupt
from test_sharding import lines, sharded_sizes, two_processes
from transformers import AutoModelForCausalLM

from tulu_lightning import cli
from tulu_lightning.callbacks.checkpoints import checkpoint_path
from tulu_lightning.callbacks.promote import Promote
from tulu_lightning.core.packing import pack
from tulu_lightning.errors import InputError
from tulu_lightning.models.lora import Lora
from tulu_lightning.models.quantize import Quantize
from tulu_lightning.types import Document, Segment

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

CONFIGS = Path(__file__).parents[2] / "configs"
LORA = Lora(r=64, alpha=128)
"""Wide enough for moments of 8 bits: 4,096 numbers a matrix on each of two ranks."""
HEADS = ("critic.head.weight", "policy.lm.score.weight")
SLOW = pytest.mark.slow
STAGES = ["sft", "dpo", *(pytest.param(name, marks=SLOW) for name in ("reward", "ppo", "grpo"))]


def stage_of(name, quantize=Quantize(), state_bits=8):  # noqa: B008  frozen
    stage = runs.STAGES[name][0]()
    stage.backbone = replace(stage.backbone, lora=LORA, quantize=quantize)
    stage.optimizer = replace(stage.optimizer, state_bits=state_bits)
    return stage


@pytest.mark.parametrize("name", STAGES)
def test_only_adapters_move_and_are_saved_and_a_stopped_run_goes_on_bit_for_bit(name, tmp_path):
    data = runs.STAGES[name][1]
    whole = stage_of(name)
    watch = runs.fit(whole, data(max_steps=3), tmp_path / "whole")
    after = runs.weights(whole)
    assert after
    assert all(".lora_" in key or key in HEADS for key in after), "nothing frozen is saved"
    assert all(
        ".lora_B." in key and not torch.equal(after[key], watch.start[key]) for key in after if ".lora_B." in key
    )
    assert sum(step["loss"] != watch.history[0]["loss"] for step in watch.history) == 2
    runs.fit(stage_of(name), data(max_steps=3), tmp_path / "half", callbacks=[Interrupt(1)])
    path = checkpoint_path(tmp_path / "half", 1)
    resumed = stage_of(name)
    runs.fit(resumed, data(max_steps=3), tmp_path / "half", ckpt_path=path)
    assert all(torch.equal(weight, after[key]) for key, weight in runs.weights(resumed).items())
    states = [stage.trainer.optimizers[0].state_dict()["state"] for stage in (whole, resumed)]
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert all(state["exp_avg_codes"].dtype == torch.uint8 for state in list(states[0].values())[:56])


def test_the_export_is_an_ordinary_model_with_the_same_log_probs(tmp_path):
    stage = stage_of("sft")
    runs.fit(stage, runs.sft_data(max_steps=2), tmp_path, callbacks=[Promote()])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "promoted", attn_implementation="eager")
    ids = torch.arange(1, 40)
    with torch.no_grad():
        ours = stage.model(pack([Document((Segment(ids, torch.ones(39)),))])).logp_N
        theirs = exported(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["live", "cached"])
def test_dpos_reference_is_the_quantised_start(mode, tmp_path):
    stage = stage_of("dpo")
    stage.reference.settings = replace(stage.reference.settings, mode=mode)
    watch = runs.fit(stage, runs.preference_data(max_steps=2), tmp_path)
    assert watch.history[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-5)
    assert watch.history[1]["loss"] != watch.history[0]["loss"]


def test_other_bits_are_another_run(tmp_path):
    runs.fit(stage_of("sft"), runs.sft_data(max_steps=3), tmp_path, callbacks=[Interrupt(1)])
    path = checkpoint_path(tmp_path, 1)
    others = {
        "backbone.quantize.kind was nf4 and is fp4": stage_of("sft", Quantize("fp4")),
        "backbone.quantize was Quantize and is None": stage_of("sft", None),
        "optimizer.state_bits was 8 and is 32": stage_of("sft", state_bits=32),
    }
    for said, stage in others.items():
        with pytest.raises(InputError, match=said):
            runs.fit(stage, runs.sft_data(max_steps=3), tmp_path, ckpt_path=path)


# Two processes --------------------------------------------------------------------------------------------------

STEPS, STOP = 6, 2


def config(folder, *callbacks, stage="sft", storage="bfloat16", compute="float32"):
    folder.mkdir(exist_ok=True)
    own = "tulu_lightning.callbacks."
    backbone = {"compute_dtype": compute, "lora": {"r": 64, "alpha": 128}, "quantize": {"storage": storage}}
    settings = {
        "include": [str(CONFIGS / f"{stage}_tiny.yaml")],
        # A large eps: else Adam moves a weight by lr in the direction of a gradient that is rounding alone.
        "model": {"init_args": {"backbone": backbone, "optimizer": {"lr": 0.01, "eps": 0.01, "state_bits": 8}}},
        "data": {"init_args": {"examples_per_step": 12, "micro_tokens": 200, "max_steps": STEPS}},
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "callbacks": [
                {"class_path": own + "records.Records"},
                *callbacks,
                {"class_path": own + "checkpoints.Checkpoints", "init_args": {"every_n_steps": 100}},
                {"class_path": own + "promote.Promote"},
            ],
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(path)]


def assert_same(one, two, rel):
    assert [row["step"] for row in lines(two)] == list(range(1, STEPS + 1))
    losses = [row["loss"] for row in lines(one)]
    assert max(losses) - min(losses) > 1e-2, "something is learned"
    for single, sharded in zip(lines(one), lines(two), strict=True):
        for key in ("loss", "grad_norm"):
            assert sharded[key] == pytest.approx(single[key], rel=rel), (single["step"], key)
    plain, gathered = (load_file(run / "promoted" / "model.safetensors") for run in (one, two))
    assert plain.keys() == gathered.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(gathered[name], tensor, rtol=0, atol=10 * rel)


@pytest.mark.slow
def test_two_processes_shard_the_codes_and_are_one(tmp_path):
    """bfloat16 storage, 8-bit moments, stopped in between: the base is quantised again, adapters and moments come back."""
    assert cli.main(config(tmp_path / "one")) == 0
    fault = {"class_path": "stage_faults.Interrupt", "init_args": {"step": STOP, "rank": 1}}
    stopped = two_processes(config(tmp_path / "two", fault))
    checkpoint = tmp_path / "two" / "run" / "checkpoints" / f"step-{STOP:06d}.ckpt"
    assert checkpoint.exists(), stopped.stderr
    sizes = sharded_sizes(checkpoint)
    saved = {name for name in sizes if name.startswith("state_dict.policy")}
    assert len(saved) == 4 * 7 * 2
    assert all(".lora_" in name for name in saved)
    assert all(len(parts) == 2 and parts[0] == parts[1] for name, parts in sizes.items() if name in saved)
    resumed = two_processes(config(tmp_path / "two"))
    assert resumed.returncode == 0, resumed.stderr
    assert f"step {STOP}" in resumed.stdout
    assert_same(tmp_path / "one" / "run", tmp_path / "two" / "run", 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "storage", "compute", "rel"),
    [("sft", "uint8", "float32", 1e-4), ("dpo", "bfloat16", "float32", 1e-4), ("sft", "bfloat16", "bfloat16", 0.05)],
)
def test_every_layout_on_two_processes(stage, storage, compute, rel, tmp_path):
    settings = {"stage": stage, "storage": storage, "compute": compute}
    assert cli.main(config(tmp_path / "one", **settings)) == 0
    done = two_processes(config(tmp_path / "two", **settings))
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "one" / "run", tmp_path / "two" / "run", rel)
    assert json.loads((tmp_path / "one" / "run" / "identity.json").read_text())["backbone.quantize.storage"] == storage
