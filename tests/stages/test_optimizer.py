"""AdamW's groups, clipping, and what bf16-stored weights do at small learning rates."""

from dataclasses import replace

import pytest
import stage_runs as runs
import torch
from stage_faults import Interrupt
from torch import nn

from tulu_lightning.callbacks.checkpoints import checkpoint_path
from tulu_lightning.core.schedules import lr_factor
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.models.lora import Lora
from tulu_lightning.stages.optimizer import AdamW, clip, differing, samples
from tulu_lightning.stages.sft import SFT


def ones(*shape):
    return nn.Parameter(torch.ones(*shape))


def test_norms_and_biases_are_decayed_unless_left_out():
    for whole, expected in ((True, (0.9, 0.9)), (False, (0.9, 1.0))):
        matrix, vector, frozen = ones(2, 2), ones(2), ones(3).requires_grad_(False)
        settings = AdamW(lr=0.1, weight_decay=1.0, decay_norms_and_biases=whole)
        optimizer = settings.build([vector, matrix, frozen])
        matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
        optimizer.step()
        assert (matrix[0, 0].item(), vector[0].item()) == pytest.approx(expected), "w - lr · decay · w"
        assert optimizer.defaults["fused"]
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_leaving_norms_out_of_no_decay_is_refused():
    with pytest.raises(InputError, match=r"decay_norms_and_biases: is False\. It does nothing while weight_decay is 0"):
        AdamW(lr=0.1, decay_norms_and_biases=False)


def test_with_two_groups_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    def stage():
        return runs.sft(weight_decay=0.1, decay_norms_and_biases=False)

    whole = stage()
    runs.fit(whole, runs.sft_data(max_steps=3), tmp_path / "whole")
    assert [len(group["params"]) for group in whole.trainer.optimizers[0].param_groups] == [4 * 7 + 1, 4 * 2 + 1]
    runs.fit(stage(), runs.sft_data(max_steps=3), tmp_path / "half", callbacks=[Interrupt(1)])
    resumed = stage()
    runs.fit(resumed, runs.sft_data(max_steps=3), tmp_path / "half", ckpt_path=checkpoint_path(tmp_path / "half", 1))
    after = runs.weights(whole)
    assert all(torch.equal(weight, after[name]) for name, weight in runs.weights(resumed).items())


@pytest.mark.parametrize(("limit", "expected"), [(1.0, 0.2), (5.0, 1.0), (100.0, 1.0), (0.0, 1.0)])
def test_gradients_are_scaled_down_to_the_limit_and_the_norm_before_is_returned(limit, expected):
    one, two, none = ones(1), ones(1), ones(1)
    one.grad, two.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert clip([one, two, none], limit) == pytest.approx(5.0)
    assert (one.grad / 3).item() == pytest.approx(expected, abs=1e-5)
    assert (two.grad / 4).item() == pytest.approx(expected, abs=1e-5)


def test_a_norm_that_is_not_finite_leaves_the_gradients_to_be_skipped():
    weight = ones(2)
    weight.grad = torch.tensor([float("nan"), 1.0])
    assert clip([weight], 1.0) != clip([weight], 1.0)


def test_schedules_by_hand():
    steps = range(5)
    # 5 steps, ceil(0.2 · 5) = 1 of warm-up at half the rate, then 4 of decay
    assert [lr_factor(k, 5, "linear", 0.2) for k in steps] == [0.5, 1.0, 0.75, 0.5, 0.25]
    assert [lr_factor(k, 5, "constant", 0.2) for k in steps] == [0.5, 1.0, 1.0, 1.0, 1.0]
    half = 0.5**0.5
    cosine = [0.5, 1.0, 0.5 + half / 2, 0.5, 0.5 - half / 2]
    assert [lr_factor(k, 5, "cosine", 0.2) for k in steps] == pytest.approx(cosine)


def test_a_share_of_changed_weights_is_counted_over_bf16_ones_that_train():
    low, high, frozen = ones(3000, 2), ones(5), ones(5).requires_grad_(False)
    low.data, frozen.data = low.data.bfloat16(), frozen.data.bfloat16()
    before = samples([low, high, frozen])
    assert [len(sample) for sample in before] == [1200], "every fifth of 6000"
    with torch.no_grad():
        low[:1500] += 1
    assert differing(before, samples([low, high, frozen])).tolist() == [600, 1200]


def bf16(lr, **more):
    return SFT(Backbone(runs.TINY, "bfloat16", weights_dtype="bfloat16", **more), AdamW(lr=lr, schedule="constant"))


@pytest.mark.filterwarnings("error:WEIGHTS STORED")
def test_bf16_weights_move_at_a_large_rate(tmp_path):
    stage = bf16(3e-3)
    watch = runs.fit(stage, runs.sft_data(max_steps=2), tmp_path)
    assert {weight.dtype for weight in stage.model.parameters()} == {torch.bfloat16}
    assert all(step["weights_changed"] > 0.9 for step in watch.history)
    assert watch.history[1]["loss"] < watch.history[0]["loss"]


def test_bf16_weights_at_a_small_rate_mostly_stand_still_with_a_loud_warning(tmp_path):
    with pytest.warns(UserWarning, match="WEIGHTS STORED IN BFLOAT16 WILL HARDLY TRAIN at a learning rate of 5e-07"):
        watch = runs.fit(bf16(5e-7), runs.sft_data(max_steps=2), tmp_path / "bf16")
    assert all(step["weights_changed"] < 0.1 for step in watch.history)
    masters = runs.sft(lr=5e-7, schedule="constant")
    watch = runs.fit(masters, runs.sft_data(max_steps=1), tmp_path / "fp32")
    after = runs.weights(masters)
    moved = sum(int((weight != watch.start[name]).sum()) for name, weight in after.items())
    assert moved / sum(weight.numel() for weight in after.values()) > 0.5, "fp32 masters do move"
    assert "weights_changed" not in watch.history[0]


@pytest.mark.filterwarnings("error:WEIGHTS STORED")
def test_adapters_over_bf16_weights_are_no_reason_to_warn(tmp_path):
    watch = runs.fit(bf16(1e-6, lora=Lora(r=4)), runs.sft_data(max_steps=1), tmp_path)
    assert "weights_changed" not in watch.history[0]


def test_bf16_weights_without_bf16_products_are_refused():
    with pytest.raises(InputError, match=r"weights_dtype: is bfloat16 while compute_dtype is float32"):
        replace(Backbone(runs.TINY), weights_dtype="bfloat16")
