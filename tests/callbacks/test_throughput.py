"""Tokens a second, MFU and memory are added to each step before it is recorded."""

import json
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.append(str(Path(__file__).parents[1] / "stages"))

import stage_runs as runs

from tulu_lightning.callbacks.records import Records
from tulu_lightning.callbacks.throughput import Throughput, device_peak, measured_peak, model_shape
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.models.lora import Lora
from tulu_lightning.models.quantize import Quantize
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.sft import SFT

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def fit(folder, stage, data, *callbacks):
    L.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=folder, callbacks=list(callbacks), **QUIET).fit(
        stage, data
    )
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_step_says_how_fast_it_was_and_what_share_of_the_peak_that_is(tmp_path):
    data, peak = runs.sft_data(max_steps=2), 1e12
    rows = fit(tmp_path, runs.sft(), data, Throughput(peak=peak), Records())
    for step, row in enumerate(rows):
        documents = [data.documents[i] for i in data.train_dataloader().dataset[step].rows]
        lengths = [len(document.segments[0].ids_L) for document in documents]
        assert row["tokens"] == sum(lengths)
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["trained_tokens_per_second"] == pytest.approx(row["trained_tokens"] / row["seconds"])
        # 4 layers of width 256: queries 256², keys and values 128 · 256 each, output 256², three of 256 · 512
        weights = 4 * (2 * 256**2 + 2 * 128 * 256 + 3 * 256 * 512)
        flops = 6 * weights * sum(lengths) + 6 * 264 * 256 * row["trained_tokens"]
        flops += 12 * 4 * 256 * sum(n * (n + 1) / 2 for n in lengths)
        assert row["mfu"] == pytest.approx(flops / row["seconds"] / peak)
        assert row["peak_memory_bytes"] > 50e6


def test_on_an_unknown_machine_there_is_no_mfu_unless_measured_and_ppo_has_none(tmp_path):
    for name, stage, data, peak in (
        ("auto", runs.sft(), runs.sft_data(max_steps=1), "auto"),
        ("ppo", runs.ppo(), runs.prompt_data(max_steps=1), 1e12),
    ):
        extra = [] if name == "auto" else [runs.RolloutRefresh()]
        (row,) = fit(tmp_path / name, stage, data, *extra, Throughput(peak=peak), Records())
        assert "mfu" not in row
        assert row["tokens_per_second"] > 0
    (row,) = fit(tmp_path / "measured", runs.dpo(), runs.preference_data(max_steps=1), Throughput("measure"), Records())
    assert 0 < row["mfu"] < 2


def test_a_measured_peak_is_that_of_a_matrix_product():
    assert 1e8 < measured_peak(torch.device("cpu"), torch.float32) < 1e14


def test_gpus_are_known_by_name():
    assert device_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert device_peak("NVIDIA H100 PCIe") == 756e12
    assert device_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert device_peak("NVIDIA L4") == 121e12
    assert device_peak("NVIDIA L40S") == 362e12
    assert device_peak("NVIDIA GH200 480GB") == 989e12
    assert device_peak("NVIDIA GeForce RTX 4090") == 165e12
    assert device_peak("NVIDIA RTX 6000 Ada Generation") == 364e12
    assert device_peak("Some card") is None


@pytest.mark.parametrize(
    "name", ["RTX A4000", "GeForce RTX 4090 Laptop GPU", "GeForce RTX 4090 D", "GeForce RTX 3090 Ti", "A100X"]
)
def test_a_gpu_whose_name_holds_anothers_has_not_its_peak(name):
    assert device_peak(f"NVIDIA {name}") is None


def test_records_before_it_would_miss_its_numbers(tmp_path):
    with pytest.raises(InputError, match="List Throughput before Records"):
        fit(tmp_path, runs.sft(), runs.sft_data(max_steps=1), Records(), Throughput())
    with pytest.raises(InputError, match=r"Throughput\.peak: is -1"):
        Throughput(peak=-1)


def test_a_frozen_base_is_seen_in_the_shape():
    stage = runs.sft()
    stage.configure_model()
    shape = model_shape(stage.model)
    stage.model.requires_grad_(False)
    frozen = model_shape(stage.model)
    assert shape.trained == shape.matrices > 0
    assert frozen == shape._replace(trained=0, head_trained=False)


def test_gpt2s_linear_layers_are_counted(tmp_path):
    """They are of a class of their own."""
    config = {"vocab_size": 264, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 258}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    GPT2LMHeadModel(GPT2Config(**config, **dropout)).save_pretrained(tmp_path)
    shape = model_shape(PackedLM(Backbone(str(tmp_path)), str(tmp_path)))
    matrices = 2 * (64 * 3 * 64 + 64 * 64 + 2 * 64 * 256)  # of each layer: queries, keys and values; output; two of 4 x
    assert shape == (matrices, matrices, 264 * 64, True, 2 * 64)


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_a_base_in_4_bits_costs_what_its_matrices_do(storage):
    """Their tensors hold two codes an item, or four."""
    pytest.importorskip("bitsandbytes")
    stage = SFT(Backbone(runs.TINY, lora=Lora(r=4), quantize=Quantize(storage=storage)), AdamW(lr=1e-3))
    stage.configure_model()
    shape = model_shape(stage.model)
    adapters = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    # 4 layers of width 256: queries 256², keys and values 128 · 256 each, output 256², three of 256 · 512
    assert shape.matrices == 4 * (2 * 256**2 + 2 * 128 * 256 + 3 * 256 * 512) + adapters
    assert shape.trained == adapters > 0
