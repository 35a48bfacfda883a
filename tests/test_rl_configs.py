"""The RLVR configs of the paper's sizes hold its numbers, and its prompt set leads each row to its verifier."""

from functools import cache
from pathlib import Path

import pytest
import yaml

from tulu_lightning import cli
from tulu_lightning.data import files
from tulu_lightning.data.prompt_formats import ROUTES
from tulu_lightning.data.prompts import PromptData, PromptSource
from tulu_lightning.data.sources import load
from tulu_lightning.launch.compose import compose, merge, value_at

CONFIGS = Path(__file__).parents[1] / "configs"
RLVR = "allenai/RLVR-GSM-MATH-IF-Mixed-Constraints"
EVERY_PPO = {  # tables 21 and 22 and section 6.2, of every size
    "model.advantage.class_path": "tulu_lightning.core.estimators.GAE",
    "model.advantage.init_args.gamma": 1.0,
    "model.advantage.init_args.lam": 0.95,
    "model.optimizer.schedule": "linear",
    "model.optimizer.max_grad_norm": 1.0,
    "model.critic.path": "allenai/Llama-3.1-Tulu-3-8B-RM",
    "model.critic.optimizer.schedule": "linear",
    "model.critic.optimizer.max_grad_norm": 1.0,
    "model.policy_loss.clip_low": 0.2,
    "model.policy_loss.clip_high": 0.2,
    "model.value_loss.clip": 0.2,
    "model.value_coefficient": 0.1,
    "model.mini_batches": 1,
    "model.epochs": 4,
    "model.reward.right": 10.0,
    "model.overlong.kind": "penalty",
    "model.overlong.penalty": -10.0,
    "model.kl.place": "reward",
    "model.kl.estimator": "k1",
    "model.rollout.samples_per_prompt": 1,
    "model.rollout.temperature": 1.0,
    "model.rollout.top_p": 1.0,
    "model.rollout.staleness": 1,
    "model.aggregation": "token",
    "model.correction.kind": "none",
    "data.max_tokens": 2048,
    "data.template": "tulu",
}
PPO = {  # tables 21 (8B, 70B) and 35 (405B), section 6.3 (GPUs); the release's commands (seeds, episodes, intervals)
    "8b": {
        "model.backbone.path": "allenai/Llama-3.1-Tulu-3-8B-DPO",
        "model.optimizer.lr": 3e-7,
        "model.optimizer.warmup_ratio": 0.0,
        "model.kl.coefficient": 0.05,
        "model.rollout.max_new_tokens": 2048,
        "data.examples_per_step": 224,
        "episodes": 10_000_000,
        "every": 100,
        "seed": 3,
        "gpus": 8,
    },
    "70b": {
        "model.backbone.path": "allenai/Llama-3.1-Tulu-3-70B-DPO",
        "model.optimizer.lr": 1e-7,
        "model.optimizer.warmup_ratio": 0.1,
        "model.kl.coefficient": 0.07,
        "model.rollout.max_new_tokens": 2048,
        "data.examples_per_step": 640,
        "episodes": 400_000,
        "every": 40,
        "seed": 8,
        "gpus": 48,
    },
    "405b": {
        "model.backbone.path": "allenai/Llama-3.1-Tulu-3-405B-DPO",
        "model.optimizer.lr": 1e-7,
        "model.optimizer.warmup_ratio": 0.0,
        "model.kl.coefficient": 0.05,
        "model.rollout.max_new_tokens": 1024,
        "data.examples_per_step": 1856,
        "episodes": 400_000,
        "every": 25,
        "seed": 3,
        "gpus": 256,
    },
}
GRPO = {  # Tülu 3.1 8B, as open-instruct documents its original run
    "model.backbone.path": "allenai/Llama-3.1-Tulu-3-8B-DPO",
    "model.optimizer.lr": 5e-7,
    "model.optimizer.schedule": "constant",
    "model.advantage.class_path": "tulu_lightning.core.groups.GRPO",
    "model.advantage.init_args.eps": 1e-8,
    "model.kl.coefficient": 0.01,
    "model.kl.place": "loss",
    "model.kl.estimator": "k3",
    "model.rollout.samples_per_prompt": 16,
    "model.rollout.temperature": 1.0,
    "model.rollout.max_new_tokens": 2048,
    "model.policy_loss.clip_low": 0.2,
    "model.policy_loss.clip_high": 0.2,
    "model.reward.right": 10.0,
    "model.overlong.kind": "penalty",
    "model.overlong.penalty": 0.0,
    "model.epochs": 1,
    "model.mini_batches": 2,
    "data.examples_per_step": 48,
    "data.max_tokens": 2048,
    "data.template": "tulu",
}


def composed(name: str) -> dict:
    return merge(compose(CONFIGS / name))


def init_arg(config: dict, key: str):
    section, *rest = key.split(".")
    return value_at(config, (section, "init_args", *rest))


def check(config: dict, numbers: dict):
    for key, expected in numbers.items():
        if "." in key:
            assert (init_arg(config, key), type(init_arg(config, key))) == (expected, type(expected)), key
    callbacks = {
        each["class_path"].rpartition(".")[2]: each.get("init_args") for each in config["trainer"]["callbacks"]
    }
    assert {"RolloutRefresh", "Records", "Promote"} <= callbacks.keys()
    return callbacks["Checkpoints"]["every_n_steps"], config["trainer"]["devices"] * config["trainer"]["num_nodes"]


def test_there_is_a_config_of_every_size():
    sizes = [("ppo", size) for size in ("tiny", "smol", *PPO)] + [("grpo", size) for size in ("tiny", "smol", "8b")]
    assert {path.name for path in CONFIGS.glob("*po_*.yaml")} >= {f"{stage}_{size}.yaml" for stage, size in sizes}


@pytest.mark.parametrize("size", PPO)
def test_a_full_size_ppo_config_holds_the_papers_numbers(size):
    config, numbers = composed(f"ppo_{size}.yaml"), PPO[size]
    assert check(config, {**EVERY_PPO, **numbers}) == (numbers["every"], numbers["gpus"])
    assert {config["seed_everything"], *(init_arg(config, k) for k in ("data.seed", "model.rollout.seed"))} == {
        numbers["seed"]
    }
    assert init_arg(config, "data.max_steps") == numbers["episodes"] // numbers["data.examples_per_step"]
    for name in ("lr", "warmup_ratio"):  # the release drives the critic's optimiser with the policy's numbers
        critic = init_arg(config, f"model.critic.optimizer.{name}") or 0.0
        assert critic == numbers[f"model.optimizer.{name}"]


def test_the_8b_grpo_config_holds_the_numbers_of_tulu_3_1():
    config = composed("grpo_8b.yaml")
    assert check(config, GRPO) == (40, 16)
    assert init_arg(config, "model.critic") is None
    assert init_arg(config, "data.max_steps") == 10_000_000 // (48 * 16)


@pytest.mark.parametrize("name", ["ppo_8b", "ppo_70b", "ppo_405b", "grpo_8b"])
def test_a_server_of_that_length_holds_every_prompt_with_its_response(name):
    config = composed(f"{name}.yaml")
    room = init_arg(config, "model.rollout.engine.max_model_len")
    assert room == init_arg(config, "data.max_tokens") + init_arg(config, "model.rollout.max_new_tokens")


@pytest.mark.parametrize("name", ["ppo_8b", "grpo_8b"])
def test_the_engine_beside_an_8b_policy_has_room_for_samples(name):
    """Keys and values of a token: two a layer, 32 layers, 8 heads of 128, 2 bytes: 128 KB, so 512 MB for 4,096 tokens."""
    room = init_arg(composed(f"{name}.yaml"), "model.rollout.engine.kv_cache_mb")
    assert room >= 16 * 4096 * 2 * 32 * 8 * 128 * 2 / 2**20 == 16 * 512


@pytest.mark.parametrize("name", ["ppo_8b", "ppo_70b", "grpo_8b"])
def test_all_prompts_of_the_papers_set_are_used(name):
    assert init_arg(composed(f"{name}.yaml"), "data.sources") == [{"name": "tulu3-rlvr", "hub": RLVR}]


def test_the_405b_was_trained_on_math_alone():
    (source,) = init_arg(composed("ppo_405b.yaml"), "data.sources")
    assert (source["hub"], source["match"]) == (RLVR, {"dataset": "MATH"})


def test_what_is_printed_of_ppo_8b_shows_every_setting_of_the_paper(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fit", "--config", str(CONFIGS / "ppo_8b.yaml"), "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    check(config, {**EVERY_PPO, **PPO["8b"]})


# The prompt set -----------------------------------------------------------------------------------------------------


def row(dataset, target, number):
    messages = [{"role": "user", "content": f"Question {number} of {dataset}?"}]
    return {"messages": messages, "ground_truth": target, "dataset": dataset, "constraint_type": "", "constraint": ""}


IFEVAL = '{"func_name": "validate_lowercase", "N": null, "word": null}'


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the set on the hub: its columns, and rows of its three kinds."""
    datasets = pytest.importorskip("datasets")
    targets = {"gsm8k": "72", "MATH": r"\frac{1}{2}", "ifeval": IFEVAL}
    rows = [row(name, target, number) for number in range(3) for name, target in targets.items()]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_list(rows))
    monkeypatch.setattr(files, "hub_set", cache(files.hub_set.__wrapped__))


def test_the_papers_set_leads_each_row_to_its_verifier(hub):
    config = composed("data/tulu3_rlvr.yaml")
    assert init_arg(config, "data.routes") == ROUTES
    sources = [PromptSource(**source) for source in init_arg(config, "data.sources")]
    settings = {"tokenizer": "tiny-random-llama", "template": "tulu", "max_tokens": 256, "examples_per_step": 3}
    data = PromptData(sources=sources, routes=init_arg(config, "data.routes"), **settings)
    found = {(prompt.source, check.verifier, check.target) for prompt in data.prompts for check in prompt.checks}
    assert found == {
        ("gsm8k", "gsm8k", "72"),
        ("MATH", "math", r"\frac{1}{2}"),
        ("ifeval", "ifeval_tulu", IFEVAL),
    }
    assert len(data.prompts) == 9


def test_the_405bs_source_takes_the_math_rows_only(hub):
    (source,) = init_arg(composed("ppo_405b.yaml"), "data.sources")
    assert [found["dataset"] for found in load(PromptSource(**source))] == ["MATH"] * 3


def test_the_release_can_be_judged_by_its_own_mistakes(capsys, tmp_path, monkeypatch):
    """As the comment in the file says: the routes are an option."""
    monkeypatch.chdir(tmp_path)
    routes = {"gsm8k": "gsm8k_release", "MATH": "math_release", "ifeval": "ifeval_tulu_release"}
    settings = {"include": str(CONFIGS / "ppo_8b.yaml"), "data": {"init_args": {"routes": routes}}}
    Path("mine.yaml").write_text(yaml.safe_dump(settings))
    assert cli.main(["fit", "--config", "mine.yaml", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["routes"] == routes
    data = PromptData(sources=[], routes=routes, tokenizer="x", max_tokens=1, examples_per_step=1)
    assert data.routes == routes
