"""The engine in this process on a GPU: the CPU's tokens and log-probs, the trainer's weights, and its own random state."""

import pytest
import torch
from test_contract import PROMPTS, scores, sharp

from tulu_lightning.callbacks.undisturbed import undisturbed
from tulu_lightning.models.lora import Lora, adapt
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.types import Sampling

pytestmark = pytest.mark.gpu
GREEDY = Sampling(max_new_tokens=24, temperature=0.0, stop_ids=())


@pytest.mark.parametrize("decode", ["auto", "transformers"])
def test_tokens_and_log_probs_are_those_of_the_cpu(decode, tiny, device):
    model = sharp(tiny)
    here = LocalEngine.from_model(model, torch.float32, "cpu", 1, decode=decode)
    there = LocalEngine.from_model(model.to(device), torch.float32, device, 1, decode=decode)
    assert there.fingerprint() == here.fingerprint()
    greedy, wanted = (engine.generate(PROMPTS, 1, GREEDY, 0) for engine in (there, here))
    assert [x[0].ids_L.tolist() for x in greedy] == [x[0].ids_L.tolist() for x in wanted]
    sampled, wanted = (engine.generate(PROMPTS, 4, Sampling(max_new_tokens=16), 3) for engine in (there, here))
    same = sum(
        torch.equal(a.ids_L, b.ids_L) for x, y in zip(sampled, wanted, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert same >= 18, "of 20: a draw on the edge may fall otherwise"
    pairs = [(prompt, x.ids_L.tolist()) for prompt, found in zip(PROMPTS, sampled, strict=True) for x in found]
    flat = [x for found in sampled for x in found]
    for x, expected in zip(flat, scores(model.cpu(), pairs), strict=True):
        torch.testing.assert_close(x.logprobs_L, expected, atol=2e-3, rtol=1e-3)


def test_bf16_weights_are_proved_after_a_refresh(tiny, device):
    model = sharp(tiny).to(device)
    engine = LocalEngine.from_model(model, torch.bfloat16, device, 1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * weight.std() * torch.randn_like(weight))
    engine.refresh(model.state_dict().items(), 2)
    assert engine.version == 2
    found = engine.generate(PROMPTS, 2, Sampling(max_new_tokens=16), 3)
    pairs = [(prompt, x.ids_L.tolist()) for prompt, group in zip(PROMPTS, found, strict=True) for x in group]
    for x, expected in zip((x for group in found for x in group), scores(model.float().cpu(), pairs), strict=True):
        assert (x.logprobs_L - expected).abs().mean() < 0.15


def test_making_an_engine_and_sampling_leave_the_generators_alone(tiny, device):
    model = sharp(tiny).to(device)
    before = torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()
    engine = LocalEngine.from_model(model, torch.float32, device)
    engine.generate(PROMPTS, 2, Sampling(max_new_tokens=4), 0)
    with undisturbed():
        torch.randn(8, device=device)
    after = torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()
    assert torch.equal(before, after)


def test_merged_adapters_reach_the_engine(tiny, device):
    model = sharp(tiny)
    adapt(model, Lora(r=4, alpha=8), tiny)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.05)
    here, there = (
        LocalEngine.from_model(model, torch.float32, "cpu"),
        LocalEngine.from_model(model.to(device), torch.float32, device),
    )
    for a, b in zip(*(engine.generate(PROMPTS, 1, GREEDY, 0) for engine in (here, there)), strict=True):
        assert torch.equal(a[0].ids_L, b[0].ids_L)
