"""Activation checkpointing and compiled layers change speed and memory, not what is learned."""

from dataclasses import replace

import pytest
import stage_runs as runs
import torch

from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import PackedLM
from tulu_lightning.models.linear import recompute_mlps

SWITCHES = ("activation_checkpointing", "recompute_mlps", "compile")


def run(folder, **switches):
    """Two steps of one pass on two layers: compiling takes most of the time, and is once for a shape."""
    stage = runs.sft()
    stage.backbone = replace(stage.backbone, layers=2, **switches)
    return runs.fit(stage, runs.sft_data(max_steps=2, examples_per_step=2, micro_tokens=10_000), folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", SWITCHES)
def test_the_losses_and_gradients_are_those_without(name, plain, tmp_path):
    watch = run(tmp_path, **{name: True})
    assert watch.gradients.keys() == plain.gradients.keys(), "names stay"
    for one, other in zip(plain.history, watch.history, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    for key, gradient in plain.gradients.items():
        torch.testing.assert_close(watch.gradients[key], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_the_switches_are_on(tiny):
    model = PackedLM(replace(runs.sft().backbone, compile=True, activation_checkpointing=True), tiny)
    layers = model.lm.get_decoder().layers
    assert all(layer._compiled_call_impl is not None and layer.gradient_checkpointing for layer in layers)


def test_recomputed_mlps_are_all_of_them(tiny):
    model = PackedLM(replace(runs.sft().backbone, recompute_mlps=True), tiny)
    assert all(layer.mlp.recompute for layer in model.lm.get_decoder().layers)


def test_recomputing_mlps_beside_whole_layers_is_refused():
    with pytest.raises(InputError, match="does nothing beside activation_checkpointing"):
        replace(runs.sft().backbone, recompute_mlps=True, activation_checkpointing=True)


def test_where_there_is_no_known_mlp_none_is_marked():
    assert recompute_mlps(torch.nn.Sequential(torch.nn.Linear(2, 2))) == 0
