"""All stages train adapters alone, resume bit for bit, and leave merged weights."""

from dataclasses import replace

import pytest
import stage_runs as runs
import torch
from stage_faults import Interrupt
from transformers import AutoModelForCausalLM

from tulu_lightning.callbacks.checkpoints import checkpoint_path
from tulu_lightning.callbacks.promote import Promote
from tulu_lightning.core.packing import pack
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import PackedLM
from tulu_lightning.models.lora import Lora
from tulu_lightning.types import Document, Segment

LORA = Lora(r=4, alpha=8)
HEADS = ("critic.head.weight", "policy.lm.score.weight")
"""Scalar heads, which train beside the adapters."""


def adapted(name, lora=LORA):
    stage = runs.STAGES[name][0]()
    stage.backbone = replace(stage.backbone, lora=lora)
    return stage


@pytest.mark.parametrize("name", runs.STAGES)
def test_only_adapters_move_and_a_stopped_run_goes_on_bit_for_bit(name, tmp_path):
    data = runs.STAGES[name][1]
    whole = adapted(name)
    watch = runs.fit(whole, data(max_steps=3), tmp_path / "whole")
    after = runs.weights(whole)
    changed = {key for key, weight in after.items() if not torch.equal(weight, watch.start[key])}
    assert changed
    assert all(".lora_" in key or key in HEADS for key in changed)
    assert all(".lora_A." in key or key in changed for key in after if ".lora_" in key), "every B has left 0"
    runs.fit(adapted(name), data(max_steps=3), tmp_path / "half", callbacks=[Interrupt(1)])
    resumed = adapted(name)
    runs.fit(resumed, data(max_steps=3), tmp_path / "half", ckpt_path=checkpoint_path(tmp_path / "half", 1))
    assert all(torch.equal(weight, after[key]) for key, weight in runs.weights(resumed).items())
    states = [[o.state_dict()["state"] for o in stage.trainer.optimizers] for stage in (whole, resumed)]
    for one, other in zip(*states, strict=True):
        assert all(torch.equal(one[i]["exp_avg"], other[i]["exp_avg"]) for i in one)
    assert len(states[0][0]) == 4 * 7 * 2 + (name == "reward"), "the optimiser knows of nothing frozen"


def test_the_export_is_an_ordinary_model_with_the_same_log_probs(tmp_path):
    stage = adapted("sft")
    runs.fit(stage, runs.sft_data(max_steps=2), tmp_path, callbacks=[Promote()])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "promoted", attn_implementation="eager")
    assert exported.state_dict().keys() == AutoModelForCausalLM.from_pretrained(stage.folder).state_dict().keys()
    ids = torch.arange(1, 40)
    with torch.no_grad():
        ours = stage.model(pack([Document((Segment(ids, torch.ones(39)),))])).logp_N
        theirs = exported(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        start = PackedLM(replace(stage.backbone, lora=None), stage.folder)
        base = start(pack([Document((Segment(ids, torch.ones(39)),))])).logp_N
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert (ours - base).abs().max() > 1e-3


def test_ppos_reference_is_the_policy_without_adapters_and_its_engine_has_them_merged(tmp_path):
    stage = adapted("ppo")
    watch = runs.fit(stage, runs.prompt_data(max_steps=3), tmp_path)
    assert stage._reference == [], "no second copy of the base"
    assert watch.history[0]["kl"] == 0
    assert watch.history[2]["kl"] != 0
    assert max(step["mismatch_max"] for step in watch.history) < 1e-4
    assert [step["first_ratio_error"] for step in watch.history] == [0.0] * 3


def test_dpos_first_step_has_no_margin_over_the_base(tmp_path):
    watch = runs.fit(adapted("dpo"), runs.preference_data(max_steps=2), tmp_path)
    assert watch.history[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-5)


def test_other_adapters_are_another_run(tmp_path):
    runs.fit(adapted("sft"), runs.sft_data(max_steps=3), tmp_path, callbacks=[Interrupt(1)])
    path = checkpoint_path(tmp_path, 1)
    for lora, said in ((Lora(r=4, alpha=16), "backbone.lora.alpha was 8 and is 16"), (None, "backbone.lora was Lora")):
        with pytest.raises(InputError, match=said):
            runs.fit(adapted("sft", lora), runs.sft_data(max_steps=3), tmp_path, ckpt_path=path)
