"""PPO and GRPO on two CPU processes under `strategy: fsdp2` are PPO and GRPO on one: rollouts, losses, weights."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_sharding import lines, two_processes

from tulu_lightning import cli

CONFIGS = Path(__file__).parents[2] / "configs"
OWN = "tulu_lightning.callbacks."
SAME = (
    *("loss", "policy_loss", "grad_norm", "ratio_mean", "ratio_max", "clip_share", "entropy", "kl", "kl_response"),
    *("reward", "score", "length", "responses", "trained_responses", "tokens", "trained_tokens", "advantage_std"),
    *("value_loss", "critic_grad_norm", "explained_variance", "mismatch_kl", "version", "refills"),
)
"""Metrics that do not depend on the number of ranks, of those that a run has."""


def config(folder, stage, *callbacks, engines="per_rank", **model):
    """The shipped tiny run with a score that differs between random responses, clipping, and packs of a few responses."""
    folder.mkdir(exist_ok=True)
    settings = {
        "include": [str(CONFIGS / f"{stage}_tiny.yaml")],
        "model": {
            "init_args": {
                # A large eps: else Adam moves a weight by lr in the direction of a gradient that is rounding alone.
                "optimizer": {"lr": 1e-2, "eps": 1e-2, "max_grad_norm": 0.05},
                "rollout": {"samples_per_prompt": 4, "max_new_tokens": 8, "engines": engines},
                "micro_tokens": 120,
                "overlong": {"kind": "none"},
                **model,
            }
        },
        "data": {
            "init_args": {
                "examples_per_step": 5,
                "max_steps": 3,
                "sources": [{"name": "even", "rows": "stage_runs.even_rows", "args": {"count": 40}}],
            }
        },
        "trainer": {
            "default_root_dir": str(folder / "run"),
            "callbacks": [
                {"class_path": OWN + "records.Records", "init_args": {"rollouts_per_step": 100}},
                {"class_path": OWN + "refresh.RolloutRefresh"},
                *callbacks,
                {"class_path": OWN + "checkpoints.Checkpoints", "init_args": {"every_n_steps": 1, "keep": 1}},
                {"class_path": OWN + "promote.Promote"},
            ],
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(path)]


PPO = {"critic": {"warmup_steps": 1}}
"""The first checkpoint is written before the policy's optimiser has made a step."""
GRPO = {
    "dynamic_sampling": {"max_refills": 1},
    "kl": {"coefficient": 0.05, "place": "loss", "estimator": "k3"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """PPO on one process, and on two, stopped by a signal to one of them and run again; GRPO with one engine for both."""
    root = tmp_path_factory.mktemp("ppo")
    assert cli.main(config(root / "ppo one", "ppo", **PPO)) == 0
    assert cli.main(config(root / "grpo one", "grpo", engines="one", **GRPO)) == 0
    fault = {"class_path": "stage_faults.Interrupt", "init_args": {"step": 2, "rank": 1}}
    results = {
        "stopped": two_processes(config(root / "ppo two", "ppo", fault, **PPO)),
        "ppo": two_processes(config(root / "ppo two", "ppo", **PPO)),
        "grpo": two_processes(config(root / "grpo two", "grpo", engines="one", **GRPO)),
    }
    return root, results


def test_they_end_as_they_should(runs):
    _, results = runs
    assert "interrupted; run the same command again" in results["stopped"].stderr
    for name in ("ppo", "grpo"):
        assert results[name].returncode == 0, results[name].stderr[-4000:]
    assert "step-000002.ckpt (step 2)" in results["ppo"].stdout


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_rollouts_are_those_of_one_process(runs, stage):
    root, _ = runs
    one, two = (
        [
            {key: row[key] for key in ("step", "row", "ids", "outcome", "score", "reward", "version")}
            for row in lines(root / f"{stage} {name}" / "run", "rollouts.jsonl")
        ]
        for name in ("one", "two")
    )
    assert len(one) >= 3 * 5 * 4
    assert len({row["score"] for row in one}) > 10, "the scores differ, so advantages are not all 0"
    assert one == two


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_metrics_and_weights_are_those_of_one_process(runs, stage):
    root, _ = runs
    one, two = (lines(root / f"{stage} {name}" / "run") for name in ("one", "two"))
    assert [row["step"] for row in two] == [1, 2, 3]
    for single, sharded in zip(one, two, strict=True):
        assert sharded.keys() == single.keys()
        for key in SAME:
            if key in single:
                assert sharded[key] == pytest.approx(single[key], rel=2e-4, abs=2e-5), (single["step"], key)
        assert single["grad_norm"] > 0.05 or (stage, single["step"]) == ("ppo", 1), "clipping is in it"
    single, sharded = (
        load_file(root / f"{stage} {name}" / "run" / "promoted" / "model.safetensors") for name in ("one", "two")
    )
    assert single.keys() == sharded.keys()
    for key, tensor in single.items():
        torch.testing.assert_close(sharded[key], tensor, rtol=1e-4, atol=1e-4)


def test_advantages_are_those_of_one_process(runs):
    root, _ = runs
    for stage in ("ppo", "grpo"):
        one, two = (lines(root / f"{stage} {name}" / "run", "rollouts.jsonl") for name in ("one", "two"))
        for single, sharded in zip(one, two, strict=True):
            if single["advantage"] is None:  # the group left, as it has no signal
                assert sharded["advantage"] is None
            else:
                assert sharded["advantage"] == pytest.approx(single["advantage"], rel=1e-3, abs=1e-3), json.dumps(
                    single
                )


@pytest.mark.slow
@pytest.mark.parametrize("engines", ["per_rank", "one"])
def test_four_processes_that_sample_ahead_are_one_that_does(tmp_path, engines):
    ahead = {"rollout": {"samples_per_prompt": 4, "max_new_tokens": 8, "staleness": 1, "engines": engines}}
    assert cli.main(config(tmp_path / "one", "grpo", **{**GRPO, **ahead})) == 0
    fault = {"class_path": "stage_faults.Interrupt", "init_args": {"step": 2, "rank": 2}}
    assert "interrupted" in two_processes(config(tmp_path / "four", "grpo", fault, **{**GRPO, **ahead}), 4).stderr
    done = two_processes(config(tmp_path / "four", "grpo", **{**GRPO, **ahead}), 4)
    assert done.returncode == 0, done.stderr[-4000:]
    one, four = (lines(tmp_path / name / "run", "rollouts.jsonl") for name in ("one", "four"))
    assert [row["ids"] for row in one] == [row["ids"] for row in four]
    single, sharded = (
        load_file(tmp_path / name / "run" / "promoted" / "model.safetensors") for name in ("one", "four")
    )
    for key, tensor in single.items():
        torch.testing.assert_close(sharded[key], tensor, rtol=1e-4, atol=1e-4)
