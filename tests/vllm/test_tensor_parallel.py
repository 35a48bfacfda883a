"""A server whose two workers share the model: each proves its part of a refresh."""

import pytest
import torch
from moved_policies import LORA, policy, scores
from transformers import AutoModelForCausalLM

from tulu_lightning.models.lora import adapter_weights
from tulu_lightning.rollout import server as server_module
from tulu_lightning.rollout.server import ServerEngine
from tulu_lightning.types import Sampling

SETTINGS = {"max_model_len": 256, "kv_cache_mb": 64, "options": ("--tensor-parallel-size", "2")}
PROMPT = list(range(1, 30))


@pytest.mark.parametrize("push", ["merged", "adapter"])
def test_two_workers_prove_their_shares_and_sample_from_them(tiny, push, monkeypatch):
    answers, joined = [], server_module.joined
    monkeypatch.setattr(server_module, "joined", lambda found: answers.append(found) or joined(found))
    model = policy(tiny, 1) if push == "adapter" else AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    named = adapter_weights if push == "adapter" else lambda model: model.state_dict().items()
    if push == "merged":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
    engine = ServerEngine.started(tiny, **SETTINGS, lora=LORA if push == "adapter" else None)
    try:
        engine.refresh(named(model), 1)
        reports = next(found for found in reversed(answers) if "received" in found[0])
        assert len(reports) == 2
        assert all(not report["differ"] and not report["unproved"] for report in reports)
        (completion,) = engine.generate([PROMPT], 1, Sampling(6), 0)[0]
        expected = scores(model.eval(), PROMPT, completion.ids_L.tolist())
        assert torch.allclose(completion.logprobs_L, expected, atol=1e-3)
    finally:
        engine.close()
