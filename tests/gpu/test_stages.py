"""Runs of the real stages: the numbers of the CPU, the same bits after a stop, and every switch that a GPU is needed for."""

from dataclasses import replace

import pytest
import stage_runs as runs
import torch
from stage_faults import Interrupt

from tulu_lightning.callbacks.checkpoints import checkpoint_path
from tulu_lightning.callbacks.throughput import Throughput
from tulu_lightning.models.lora import Lora
from tulu_lightning.models.quantize import Quantize

pytestmark = pytest.mark.gpu
TEXT = ("sft", "dpo", "reward")
"""Stages whose steps hold the same rows wherever they run; a sampled token may fall otherwise by a last bit."""


@pytest.mark.parametrize("name", runs.STAGES)
def test_losses_are_those_of_the_cpu(name, tmp_path, accelerator):
    make, data = runs.STAGES[name]
    ours, theirs = make(), make()
    found = runs.fit(ours, data(max_steps=3), tmp_path / "there", accelerator=accelerator)
    wanted = runs.fit(theirs, data(max_steps=3), tmp_path / "cpu")
    for step in range(3 if name in TEXT else 1):
        for key in ("loss", "grad_norm"):
            if key in wanted.history[step]:
                assert found.history[step][key] == pytest.approx(wanted.history[step][key], rel=2e-3, abs=1e-6), key
    moved = [float((x.cpu() - found.start[key].cpu()).abs().max()) for key, x in runs.weights(ours).items()]
    assert max(moved) > 0


@pytest.mark.parametrize("name", runs.STAGES)
def test_a_stopped_run_goes_on_bit_for_bit(name, tmp_path, accelerator, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    make, data = runs.STAGES[name]
    common = {"accelerator": accelerator, "deterministic": True}
    whole, resumed = make(), make()
    try:
        runs.fit(whole, data(max_steps=3), tmp_path / "whole", **common)
        runs.fit(make(), data(max_steps=3), tmp_path / "half", callbacks=[Interrupt(1)], **common)
        runs.fit(
            resumed, data(max_steps=3), tmp_path / "half", ckpt_path=checkpoint_path(tmp_path / "half", 1), **common
        )
    finally:
        torch.use_deterministic_algorithms(False)
    after = runs.weights(resumed)
    assert all(torch.equal(weight, after[key]) for key, weight in runs.weights(whole).items())


def with_backbone(name, **changes):
    stage = runs.STAGES[name][0]()
    stage.backbone = replace(stage.backbone, **changes)
    return stage


SWITCHES = {
    "bf16": {"compute_dtype": "bfloat16"},
    "compiled": {"compute_dtype": "bfloat16", "compile": True},
    "layers recomputed": {"compute_dtype": "bfloat16", "activation_checkpointing": True},
    "mlps recomputed": {"compute_dtype": "bfloat16", "recompute_mlps": True},
    "compiled and recomputed": {"compute_dtype": "bfloat16", "compile": True, "activation_checkpointing": True},
    "bf16 weights": {"compute_dtype": "bfloat16", "weights_dtype": "bfloat16"},
    "lora": {"compute_dtype": "bfloat16", "lora": Lora(r=8, alpha=16)},
}


@pytest.mark.parametrize("name", ["sft", "dpo"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_changes_the_loss_by_rounding_alone(switch, name, tmp_path, accelerator):
    data = runs.STAGES[name][1]
    plain = runs.fit(with_backbone(name), data(max_steps=1), tmp_path / "plain", accelerator=accelerator)
    found = runs.fit(
        with_backbone(name, **SWITCHES[switch]), data(max_steps=2), tmp_path / "other", accelerator=accelerator
    )
    assert found.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], rel=2e-2)
    assert found.history[1]["loss"] != found.history[0]["loss"]


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_4_bits_and_8_bit_moments(name, tmp_path, accelerator):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    data = runs.STAGES[name][1]

    def stage():
        made = with_backbone(name, compute_dtype="bfloat16", lora=Lora(r=64, alpha=128), quantize=Quantize())
        made.optimizer = replace(made.optimizer, state_bits=8)
        return made

    whole, resumed, cpu = stage(), stage(), stage()
    found = runs.fit(whole, data(max_steps=3), tmp_path / "whole", accelerator=accelerator)
    wanted = runs.fit(cpu, data(max_steps=1), tmp_path / "cpu")
    assert found.history[0]["loss"] == pytest.approx(wanted.history[0]["loss"], rel=3e-2, abs=1e-3)
    after = runs.weights(whole)
    assert all(".lora_" in key for key in after)
    assert any(not torch.equal(x, found.start[key].to(x)) for key, x in after.items())
    runs.fit(stage(), data(max_steps=3), tmp_path / "half", callbacks=[Interrupt(1)], accelerator=accelerator)
    path = checkpoint_path(tmp_path / "half", 1)
    again = runs.fit(resumed, data(max_steps=3), tmp_path / "half", ckpt_path=path, accelerator=accelerator)
    assert again.history[-1]["loss"] == pytest.approx(found.history[-1]["loss"], rel=2e-2, abs=1e-3)


def test_speed_and_memory_are_the_devices(tmp_path, accelerator):
    stage = with_backbone("sft", compute_dtype="bfloat16")
    found = runs.fit(stage, runs.sft_data(max_steps=2), tmp_path, accelerator=accelerator, first=[Throughput()])
    if accelerator == "gpu":
        assert 0 < found.history[1]["mfu"] < 1
        assert found.history[1]["peak_memory_bytes"] == torch.cuda.max_memory_allocated()
