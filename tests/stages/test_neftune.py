"""NEFTune noise is off by default, its size is the paper's, and it is a function of (seed, step, row) alone."""

import math

import pytest
import stage_runs as runs
import torch
from stage_faults import Interrupt

from tulu_lightning.callbacks.checkpoints import checkpoint_path
from tulu_lightning.core.noise import embedding_noise
from tulu_lightning.core.packing import filler, pack
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.sft import SFT
from tulu_lightning.types import Document, Segment


def row(tokens):
    return Document((Segment(torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens)),))


def noise(packed, **more):
    return embedding_noise(packed, **{"width": 64, "alpha": 5.0, "seed": 1, "step": 2, **more})


def test_a_row_has_the_same_noise_in_every_pack_and_other_noise_in_every_step():
    both, alone = pack([row(300), row(20)], rows=(7, 3)), pack([row(20)], rows=(3,))
    assert torch.equal(noise(both)[300:], noise(alone))
    for change in ({"seed": 2}, {"step": 3}):
        assert not torch.equal(noise(alone), noise(alone, **change))
    assert not torch.equal(noise(alone), noise(alone._replace(rows=(4,))))


def test_it_is_uniform_within_alpha_by_the_root_of_the_rows_size():
    found, bound = noise(pack([row(300)], rows=(0,))), 5.0 / math.sqrt(300 * 64)
    assert found.abs().max() <= bound
    assert found.abs().max() > 0.99 * bound
    # the mean square of a uniform number in ±b is b² / 3
    assert found.square().mean().item() == pytest.approx(bound**2 / 3, rel=0.05)


def test_fillers_and_padding_have_none():
    assert not noise(filler(row(20))).any()
    padded = pack([row(20), Document((Segment(torch.zeros(5, dtype=torch.int64), torch.zeros(5)),))], rows=(3,))
    found = noise(padded._replace(padding=5))
    assert not found[20:].any()
    assert torch.equal(found[:20], noise(pack([row(20)], rows=(3,))))


def stage(alpha):
    return SFT(Backbone(runs.TINY), AdamW(lr=1e-3), neftune_alpha=alpha)


def test_a_noisy_run_is_the_same_for_every_split_and_after_a_stop(tmp_path):
    whole = stage(5.0)
    watch = runs.fit(whole, runs.sft_data(max_steps=3), tmp_path / "whole")
    cut = runs.fit(stage(5.0), runs.sft_data(max_steps=3, micro_tokens=1), tmp_path / "cut")
    for one, other in zip(watch.history, cut.history, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    runs.fit(stage(5.0), runs.sft_data(max_steps=3), tmp_path / "half", callbacks=[Interrupt(1)])
    torch.manual_seed(99)
    resumed = stage(5.0)
    path = checkpoint_path(tmp_path / "half", 1)
    runs.fit(resumed, runs.sft_data(max_steps=3), tmp_path / "half", ckpt_path=path)
    after = runs.weights(whole)
    assert all(torch.equal(weight, after[name]) for name, weight in runs.weights(resumed).items())
    silent = runs.fit(runs.sft(), runs.sft_data(max_steps=1), tmp_path / "silent")
    assert silent.history[0]["loss"] != watch.history[0]["loss"]
    with pytest.raises(InputError, match=r"neftune_alpha was 5\.0 and is 0\.0"):
        runs.fit(stage(0.0), runs.sft_data(max_steps=3), tmp_path / "half", ckpt_path=path)


def test_an_alpha_below_zero_and_an_unknown_reduction_are_refused():
    with pytest.raises(InputError, match=r"neftune_alpha: is -1"):
        stage(-1.0)
    with pytest.raises(InputError, match=r"reduction: is 'mean'\. Use one of token_mean, sum, sequence_mean"):
        SFT(Backbone(runs.TINY), AdamW(lr=1e-3), "mean")
