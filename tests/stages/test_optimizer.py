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


# Moments in 8 bits ----------------------------------------------------------------------------------------------


def trained_with(bits, steps=60, **settings):
    """A small regression by either optimiser, with a rate that falls as a stage sets it."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    optimizer = AdamW(lr=1e-2, state_bits=bits, **settings).build(model.parameters())
    inputs = torch.randn(256, 64)
    targets, losses = torch.tanh(inputs @ torch.randn(64, 64) / 8), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return model, optimizer, losses


def test_moments_in_8_bits_learn_what_those_in_32_do():
    (_, _, wide), (_, _, low) = trained_with(32), trained_with(8)
    assert low[:2] == pytest.approx(wide[:2], rel=1e-5), "the first update has no moment to round"
    assert wide[-1] < 0.1 * wide[0]
    assert low[-1] == pytest.approx(wide[-1], rel=0.1)
    assert low != wide


def test_moments_in_8_bits_take_two_bytes_a_weight_and_small_tensors_keep_32():
    model, optimizer, _ = trained_with(8, steps=1)
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        low = [moment for name, moment in state.items() if name != "step" and hasattr(moment, "codes")]
        if parameter.ndim == 2:
            held = sum(moment.codes.nbytes + moment.scale.nbytes for moment in low)
            assert 2 <= held / parameter.numel() < 2.05
        else:
            assert not low
            assert all(state[name].dtype == torch.float32 for name in ("exp_avg", "exp_avg_sq"))


def test_decay_and_groups_are_the_same_in_8_bits():
    for whole, expected in ((True, (0.9, 0.9)), (False, (0.9, 1.0))):
        matrix, vector, frozen = ones(64, 64), ones(64), ones(3).requires_grad_(False)
        settings = AdamW(lr=0.1, weight_decay=1.0, decay_norms_and_biases=whole, state_bits=8)
        optimizer = settings.build([vector, matrix, frozen])
        matrix.grad, vector.grad = torch.zeros(64, 64), torch.zeros(64)
        optimizer.step()
        assert (matrix[0, 0].item(), vector[0].item()) == pytest.approx(expected)
        assert [group["lr"] for group in optimizer.param_groups] == [0.1] * (1 if whole else 2), "a number, as set"


def test_what_8_bits_save_is_plain_tensors_and_goes_on_bit_for_bit(tmp_path):
    model, optimizer, _ = trained_with(8, steps=5)
    torch.save(optimizer.state_dict(), tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True, map_location=lambda storage, device: storage)
    assert {type(value) for values in saved["state"].values() for value in values.values()} == {torch.Tensor}
    twin, other, _ = trained_with(8, steps=1)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(saved)
    for network, own in ((model, optimizer), (twin, other)):
        network(torch.ones(4, 64)).square().sum().backward()
        own.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_what_8_bits_save_as_numbers_is_taken_up_in_8_bits_again():
    _, optimizer, _ = trained_with(8, steps=5)
    numbers = optimizer.in_fp32(optimizer.state_dict())
    assert {value.dtype for values in numbers["state"].values() for value in values.values()} == {torch.float32}
    assert all("_codes" not in name for values in numbers["state"].values() for name in values)
    _, other, _ = trained_with(8, steps=1)
    other.load_state_dict(numbers)
    for own, twin in zip(optimizer.state.values(), other.state.values(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert hasattr(own[name], "codes") == hasattr(twin[name], "codes")
            # Levels reach from -0.993 to 1 of a block's largest number: scaled by a negative one, they come to lie a bit closer.
            one, two = (x.dequantize() if hasattr(x, "codes") else x for x in (own[name], twin[name]))
            largest = one.reshape(-1, min(256, one.numel())).abs().amax(1, keepdim=True)
            assert ((one - two).reshape(len(largest), -1).abs() <= 0.01 * largest).all()
            assert one.any()


def test_without_torchao_8_bits_are_refused_before_anything_loads(monkeypatch):
    monkeypatch.setattr("tulu_lightning.stages.optimizer.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"state_bits: is 8, which needs torchao.*'tulu-lightning\[qlora\]'"):
        AdamW(lr=0.1, state_bits=8).check_packages()
    AdamW(lr=0.1).check_packages()
    with pytest.raises(InputError, match=r"state_bits: is 4\. Use 8 or 32"):
        AdamW(lr=0.1, state_bits=4)
