"""DPO: the reference is a property of the row, and training starts at it."""

import math

import pytest
import torch
from stage_runs import TINY, dpo, fit, preference_data
from transformers import AutoModelForCausalLM

from tulu_lightning.assets.models import resolve_model


def reference(folder, **changes):
    stage = dpo()
    fit(stage, preference_data(max_steps=1, **changes), folder)
    assert stage.reference is not None
    return stage.reference._tables["train"]


def test_the_references_log_probs_do_not_depend_on_packing_or_order(tmp_path):
    alone = reference(tmp_path / "alone", micro_tokens=1)
    together = reference(tmp_path / "together", micro_tokens=100_000, seed=5)
    assert alone.shape == (40, 2)
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_the_references_log_probs_are_those_of_the_start_weights_by_row(tmp_path):
    logps = reference(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(resolve_model(TINY), dtype=torch.float32)
    for row, document in list(enumerate(preference_data().documents))[::13]:
        prompt, *answers = (segment.ids_L for segment in document.segments)
        for column, answer in enumerate(answers):
            ids = torch.cat([prompt, answer])
            with torch.no_grad():
                logp = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            assert float(logps[row, column]) == pytest.approx(float(logp[-len(answer) :].sum()), abs=1e-4)


def test_the_first_steps_loss_is_log_2(tmp_path):
    watch = fit(dpo(), preference_data(max_steps=2), tmp_path)
    assert watch.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert watch.history[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert watch.history[1]["loss"] != pytest.approx(math.log(2), abs=1e-6)
