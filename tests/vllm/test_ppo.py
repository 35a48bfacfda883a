"""PPO on the tiny model with vLLM as its engine: what it samples from is what the trainer trains."""

import lightning as L
import pytest
import torch
from stage_faults import Interrupt
from stage_runs import fit, ppo, prompt_data, weights
from transformers import AutoModelForCausalLM

from tulu_lightning.callbacks.checkpoints import checkpoint_path
from tulu_lightning.callbacks.refresh import RolloutRefresh
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.models.lora import Lora
from tulu_lightning.models.weights import plain_weights
from tulu_lightning.rollout.engines import EngineSettings
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.ppo import PPO, Critic, Rollout

LORA = Lora(r=4, alpha=16)


class Snapshots(L.Callback):
    """Weights as each step begins, and what the engine sampled in it."""

    def __init__(self, engine):
        self.weights, self.sampled = [], []
        generate = engine.generate

        def recorded(prompts, *args, **kwargs):
            result = generate(prompts, *args, **kwargs)
            self.sampled.append((prompts, result))
            return result

        engine.generate = recorded

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        weights = plain_weights(pl_module.model.lm)
        # Without the second name of the tied embedding: functional_call takes one value for it.
        kept = {name: tensor.detach().clone() for name, tensor in weights if name != "lm_head.weight"}
        self.weights.append(kept)
        if len(self.weights) == 4:
            trainer.should_stop = True


@pytest.fixture(params=["vllm", "server"])
def engine(request, tiny, monkeypatch):
    if request.param == "server":
        engine = request.getfixturevalue("tiny_server")
        engine.refresh(AutoModelForCausalLM.from_pretrained(tiny).state_dict().items(), 0)
        monkeypatch.setattr(engine, "generate", engine.generate)  # put back after the test
        yield engine
        return
    from tulu_lightning.rollout.vllm import VLLMEngine

    engine = VLLMEngine.from_folder(tiny, max_model_len=512, max_num_seqs=16, kv_cache_mb=64)
    yield engine
    engine.close()


def test_every_step_samples_from_the_weights_that_it_trains(engine, tiny, tmp_path):
    stage = ppo()
    assert stage.engine is None
    follow(stage, engine, tiny, tmp_path)


def test_every_step_samples_from_the_adapters_that_it_trains(tiny, tmp_path):
    from tulu_lightning.rollout.vllm import VLLMEngine

    settings = EngineSettings("vllm", push="adapter")
    rollout = Rollout(max_new_tokens=6, samples_per_prompt=3, engine=settings)
    stage = PPO(Backbone(tiny, lora=LORA), AdamW(lr=1e-2), rollout, Critic(AdamW(lr=1e-3), layers=2), micro_tokens=256)
    engine = VLLMEngine.from_folder(tiny, max_model_len=512, max_num_seqs=16, kv_cache_mb=64, lora=LORA)
    follow(stage, engine, tiny, tmp_path)
    assert engine.fingerprint()
    assert all(".lora_" in name for name in engine.fingerprint())
    engine.close()


def test_a_run_that_pushes_adapters_goes_on_as_if_it_had_not_been_stopped(tiny, tmp_path):
    def run(name, *callbacks, **more):
        settings = EngineSettings("vllm", max_model_len=512, kv_cache_mb=64, push="adapter")
        rollout = Rollout(max_new_tokens=6, samples_per_prompt=3, engine=settings)
        stage = PPO(
            Backbone(tiny, lora=LORA), AdamW(lr=1e-2), rollout, Critic(AdamW(lr=1e-3), layers=2), micro_tokens=256
        )
        kinds = [
            RolloutRefresh(2),
            *callbacks,
        ]  # of step 3, the weights are those of step 2: adapters, kept on the host
        watch = fit(stage, prompt_data(max_steps=4), tmp_path / name, callbacks=kinds, refresh=False, **more)
        return stage, watch

    whole, _ = run("whole")
    run("stopped", Interrupt(3))
    resumed, watch = run("stopped", ckpt_path=checkpoint_path(tmp_path / "stopped", 3))
    assert [step["version"] for step in watch.history] == [2]
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def follow(stage, engine, tiny, tmp_path):
    """Fit, and compare what was sampled with a plain forward of the weights that each step began with."""
    stage.engine = engine
    snapshots = Snapshots(engine)
    watch = fit(stage, prompt_data(), tmp_path, callbacks=[snapshots])
    assert len(watch.history) >= 2
    steps = [(p, groups) for p, groups in snapshots.sampled if len(p) == 4]  # the others are canaries'
    reference = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    for step, ((prompts, groups), began) in enumerate(zip(steps, snapshots.weights, strict=True)):
        gaps = []
        for prompt, group in zip(prompts, groups, strict=True):
            for completion in group:
                assert completion.version == step
                with torch.no_grad():
                    ids = torch.tensor([[*prompt, *completion.ids_L.tolist()]])
                    out = torch.func.functional_call(reference, began, (ids,), {"use_cache": False})
                logp = torch.log_softmax(out.logits[0, len(prompt) - 1 : -1], -1)
                gaps.append((logp.gather(1, completion.ids_L[:, None])[:, 0] - completion.logprobs_L).abs())
        assert torch.cat(gaps).max() < 1e-3
    moved = [
        (a[name] != b[name]).any() for a, b in zip(snapshots.weights, snapshots.weights[1:], strict=False) for name in a
    ]
    assert any(moved), "nothing was learned, so old weights would have passed"
