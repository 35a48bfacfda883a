"""Settings out of their range are refused when they are made; what a Trainer may not do, before it does anything."""

import lightning as L
import pytest
import stage_runs as runs

from tulu_lightning.core.policy import ClippedPolicy, ClippedValue
from tulu_lightning.errors import InputError
from tulu_lightning.models.sharding import Fsdp2
from tulu_lightning.rollout.engines import EngineSettings
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.ppo import Critic, DynamicSampling, Guards, Reward, Rollout

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "key", "bad", "good"),
    [
        (ClippedPolicy, "clip_low", [0.0, -0.1, 1.1, NAN], [0.01, 1.0]),
        (ClippedPolicy, "clip_high", [0.0, -1.0, NAN], [0.28, INF]),
        (ClippedValue, "clip", [0.0, -1.0, NAN], [0.2, INF]),
        (AdamW, "lr", [0.0, -1.0, NAN, INF], [1e-6]),
        (AdamW, "warmup_ratio", [-0.1, 1.0, NAN], [0.0, 0.99]),
        (AdamW, "beta1", [-0.1, 1.0, 1.5, NAN], [0.0, 0.9]),
        (AdamW, "beta2", [-0.1, 1.0, NAN], [0.0, 0.95]),
        (AdamW, "eps", [0.0, -1e-8, NAN], [1e-5]),
        (AdamW, "weight_decay", [-0.1, NAN, INF], [0.0, 0.1]),
        (AdamW, "max_grad_norm", [-1.0, NAN, INF], [0.0, 1.0]),
        (Critic, "layers", [0, -1], [None, 1]),
        (Critic, "warmup_steps", [-1], [0, 3]),
        (Rollout, "max_new_tokens", [0, -1], [1]),
        (Rollout, "samples_per_prompt", [0], [1]),
        (Rollout, "temperature", [0.0, -1.0, NAN, INF], [1.0]),
        (Rollout, "top_k", [-1], [0]),
        (Rollout, "staleness", [-1, 2], [0, 1]),
        (EngineSettings, "dtype", ["float16"], ["bfloat16"]),
        (EngineSettings, "kind", ["sglang"], ["local", "vllm"]),
        (Reward, "right", [NAN, INF, 0.0], [1.0]),
        (DynamicSampling, "max_refills", [0], [1]),
        (Guards, "mismatch_kl", [0.0, NAN, INF], [None, 0.01]),
        (Guards, "mismatch_patience", [0], [1]),
        (Guards, "equal_rewards", [0], [None, 1]),
        (runs.ppo, "epochs", [0], [1]),
        (runs.ppo, "mini_batches", [0], [2]),
        (runs.ppo, "micro_tokens", [0], [16]),
        (runs.ppo, "entropy_coefficient", [-0.1, NAN, INF], [0.0, 0.01]),
        (runs.ppo, "aggregation", ["words"], ["token", "sequence", "constant"]),
        (runs.ppo, "value_coefficient", [0.0, -1.0, NAN, INF], [0.5]),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_its_key(make, key, bad, good):
    needed = {AdamW: {"lr": 1e-3}, Critic: {"optimizer": AdamW(1e-3)}, Rollout: {"max_new_tokens": 4}}.get(make, {})
    for value in bad:
        with pytest.raises(InputError) as error:
            make(**{**needed, key: value})
        assert error.value.where.split(".")[-1] == key
    for value in good:
        make(**{**needed, key: value})


def fit(folder, stage, data, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", default_root_dir=folder, max_epochs=1, **quiet, **settings)
    trainer.fit(stage, data)


def test_a_sampler_of_lightnings_own_is_refused_on_one_sharded_process_too(tmp_path):
    with pytest.raises(InputError, match=r"trainer\.use_distributed_sampler: is true"):
        fit(tmp_path, runs.ppo(), runs.prompt_data(), strategy=Fsdp2(), devices=1)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_data_of_another_stage_is_refused(stage, tmp_path):
    other = {"sft": runs.prompt_data, "ppo": runs.sft_data}[stage]
    with pytest.raises(InputError, match=r"data: is (PromptData|SFTData)"):
        fit(tmp_path, runs.STAGES[stage][0](), other())


def test_the_engine_is_filled_once_with_the_present_step(tmp_path, monkeypatch):
    stage = runs.sft()
    stage.configure_model()
    stage.step = 5
    versions, refresh = [], LocalEngine.refresh

    def counted(self, named, version, **more):
        versions.append(version)
        refresh(self, named, version, **more)

    monkeypatch.setattr(LocalEngine, "refresh", counted)
    assert stage.make_engine().version == 5
    assert versions == [5]
