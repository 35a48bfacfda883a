"""Every config in configs/ parses, the stage files hold the paper's numbers, and a printed config runs on its own."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from tulu_lightning import cli
from tulu_lightning.data import files
from tulu_lightning.data.sources import Source, load
from tulu_lightning.launch.compose import compose, merge, value_at

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
PAIRS = sorted(CONFIGS.glob("pairs_*.yaml"))
FITS = sorted(set(CONFIGS.glob("*_*.yaml")) - set(PAIRS))
CALLBACKS = "tulu_lightning.callbacks."


def ids(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def printed(capsys, command: str, config: Path | str, *options: str) -> str:
    """What `--print_config` prints; no model, data or output folder is touched by it."""
    capsys.readouterr()
    try:
        status = cli.main([command, "--config", str(config), *options, "--print_config"])
    except SystemExit as leaving:
        status = leaving.code
    out, err = capsys.readouterr()
    assert not status, err
    return out


def composed(name: str) -> dict:
    return merge(compose(CONFIGS / name))


def test_no_config_is_left_out_here():
    """A file that is neither tried as a leaf nor included by one would rot."""
    leaves = {*FITS, *PAIRS, *RECIPES}
    tried = {layer.path for leaf in leaves for layer in compose(leaf)}
    assert tried == set(CONFIGS.rglob("*.yaml"))
    assert {path.stem for path in FITS} >= {
        *(f"{stage}_{size}" for stage in ("sft", "dpo", "ppo") for size in ("tiny", "smol")),
        *(f"sft_{size}" for size in ("8b", "70b", "405b")),
    }


@pytest.mark.parametrize("path", FITS, ids=ids(FITS))
def test_a_stage_config_parses_and_what_is_printed_stands_alone(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = printed(capsys, "fit", path)
    config = yaml.safe_load(text)
    assert "include" not in config
    assert config["data"]["init_args"]["tokenizer"] == config["model"]["init_args"]["backbone"]["path"]
    Path("saved.yaml").write_text(text)
    assert printed(capsys, "fit", "saved.yaml") == text
    assert [p.name for p in tmp_path.iterdir()] == ["saved.yaml"]


@pytest.mark.parametrize("path", PAIRS, ids=ids(PAIRS))
def test_a_pairs_config_parses_and_what_is_printed_stands_alone(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("saved.yaml").write_text(text := printed(capsys, "pairs", path))
    assert printed(capsys, "pairs", "saved.yaml") == text


@pytest.mark.parametrize("path", RECIPES, ids=ids(RECIPES))
def test_a_recipe_parses_with_every_stage_as_it_will_start_it(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(printed(capsys, "recipe", path))
    for stage in recipe["stages"]:
        command = "fit" if stage["fit"] else "pairs"
        options = ["--" + item.format(run="runs/x", seed=7) for item in stage["set"]]
        config = yaml.safe_load(printed(capsys, command, path.parent / stage[command], *options))
        if stage["set"]:
            seeds = config["seed"] if command == "pairs" else config["data"]["init_args"]["seed"]
            assert seeds == 7


@pytest.mark.parametrize("path", FITS, ids=ids(FITS))
def test_a_stage_records_saves_and_promotes(path):
    """Lists are replaced, not merged: a leaf that changes one callback has to name them all."""
    callbacks = composed(path.name)["trainer"]["callbacks"]
    names = [callback["class_path"].removeprefix(CALLBACKS) for callback in callbacks]
    assert {"records.Records", "checkpoints.Checkpoints", "promote.Promote"} <= set(names)
    assert ("refresh.RolloutRefresh" in names) == path.stem.startswith("ppo")
    assert names[-1] == "promote.Promote", "it decides by what Evaluate found"
    if path.stem.endswith("smol"):
        (evaluate,) = (c["init_args"] for c in callbacks if c["class_path"].endswith("Evaluate"))
        assert sum(source["args"]["count"] for source in evaluate["sources"]) >= 200


PAPER = {
    "sft": {  # table 11, 8B
        "model.optimizer.lr": 5e-6,
        "model.optimizer.schedule": "linear",
        "model.optimizer.warmup_ratio": 0.03,
        "model.optimizer.weight_decay": 0.0,
        "data.examples_per_step": 128,
        "data.epochs": 2,
        "data.max_tokens": 4096,
    },
    "dpo": {  # table 20, 8B, and equation 6
        "model.loss.beta": 5.0,
        "model.loss.length_normalised": True,
        "model.optimizer.lr": 5e-7,
        "model.optimizer.schedule": "linear",
        "model.optimizer.warmup_ratio": 0.1,
        "model.optimizer.weight_decay": 0.0,
        "data.examples_per_step": 128,
        "data.epochs": 1,
        "data.max_tokens": 2048,
    },
    "ppo": {  # tables 21 and 22, equation 8, final 8B command
        "model.optimizer.lr": 3e-7,
        "model.optimizer.schedule": "linear",
        "model.optimizer.warmup_ratio": 0.0,
        "model.optimizer.max_grad_norm": 1.0,
        "model.critic.optimizer.lr": 3e-7,
        "model.rollout.samples_per_prompt": 1,
        "model.rollout.temperature": 1.0,
        "model.rollout.max_new_tokens": 2048,
        "model.reward.right": 10.0,
        "model.reward.no_stop": -10.0,
        "model.reward.kl_coefficient": 0.05,
        "model.policy_loss.clip_low": 0.2,
        "model.policy_loss.clip_high": 0.2,
        "model.value_loss.clip": 0.2,
        "model.value_coefficient": 0.1,
        "model.gamma": 1.0,
        "model.lam": 0.95,
        "model.epochs": 4,
        "model.mini_batches": 1,
        "data.examples_per_step": 224,
        "data.max_tokens": 2048,
    },
}


SIZES = {  # what differs by size: tables 11 (8B, 70B) and 34 (405B), table 14 (seeds), sections 4.3 and 10 (GPUs)
    "8b": {
        "model.backbone.path": "meta-llama/Llama-3.1-8B",
        "model.optimizer.lr": 5e-6,
        "data.examples_per_step": 128,
        "data.seed": 123,
        "gpus": 32,
    },
    "70b": {
        "model.backbone.path": "meta-llama/Llama-3.1-70B",
        "model.backbone.activation_checkpointing": True,
        "model.optimizer.lr": 2e-6,
        "data.examples_per_step": 128,
        "data.seed": 456,
        "gpus": 64,
    },
    "405b": {
        "model.backbone.path": "meta-llama/Llama-3.1-405B",
        "model.optimizer.lr": 2e-6,
        "data.examples_per_step": 256,
        "gpus": 256,
    },
}
ALL_SIZES = {  # of every size: linear to 0, 3% warm-up, 2 epochs, 4,096 tokens and what is longer cut, no decay
    **{key: PAPER["sft"][key] for key in PAPER["sft"] if key not in ("model.optimizer.lr", "data.examples_per_step")},
    "model.backbone.compute_dtype": "bfloat16",
    "data.template": "tulu",
    "data.on_overflow": "truncate",
}
TABLE_7 = {  # the SFT column of table 7
    "hardcoded": 240,
    "openassistant": 7_132,
    "no-robots": 9_500,
    "wildchat": 100_000,
    "flan-v2": 89_982,
    "sciriff": 10_000,
    "table-gpt": 5_000,
    "persona-math": 149_960,
    "persona-gsm": 49_980,
    "persona-algebra": 20_000,
    "open-math-instruct-2": 50_000,
    "numinamath-tir": 64_312,
    "persona-python": 34_999,
    "evol-codealpaca": 107_276,
    "coconot": 10_983,
    "wildjailbreak": 50_000,
    "wildguardmix": 50_000,
    "aya": 100_000,
    "persona-if": 29_980,
}


def init_arg(config: dict, key: str):
    section, *rest = key.split(".")
    return value_at(config, (section, "init_args", *rest))


@pytest.mark.parametrize("size", SIZES)
def test_a_full_size_sft_config_holds_the_papers_numbers(size):
    config = composed(f"sft_{size}.yaml")
    for key, expected in {**ALL_SIZES, **SIZES[size]}.items():
        if key == "gpus":
            assert config["trainer"]["devices"] * config["trainer"]["num_nodes"] == expected
        else:
            assert (init_arg(config, key), type(init_arg(config, key))) == (expected, type(expected)), key
    assert config["trainer"]["strategy"] == "fsdp2"
    assert config["seed_everything"] == SIZES[size].get("data.seed", 1)
    (source,) = init_arg(config, "data.sources")
    assert source == {"name": "tulu3", "hub": "allenai/tulu-3-sft-mixture"}


def test_the_papers_mixture_adds_up():
    sources = init_arg(composed("data/tulu3_sft.yaml"), "data.sources")
    assert {source["name"]: source["cap"] for source in sources} == TABLE_7
    assert len(sources) == 19
    assert sum(source["cap"] for source in sources) == 939_344
    assert len({source["match"]["source"] for source in sources}) == 19
    for source in sources:  # the number stands in the released name of most of them
        digits = [part for part in re.split(r"\D+", source["match"]["source"]) if len(part) >= 4]
        assert all(int(part) == source["cap"] for part in digits), source
    assert init_arg(composed("sft_8b_by_source.yaml"), "data.sources") == sources


def test_the_papers_mixture_draws_its_sets_out_of_the_ready_one(monkeypatch):
    """With a stand-in for the hub that has each set three times too small, and one row of a set that is not named."""
    datasets = pytest.importorskip("datasets")
    config = init_arg(composed("data/tulu3_sft.yaml"), "data.sources")
    values = [source["match"]["source"] for source in config]
    ready = datasets.Dataset.from_dict({"id": range(58), "source": [*(values * 3), "another"]})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append(args) or ready)
    monkeypatch.setattr(files, "hub_set", cache(files.hub_set.__wrapped__))
    taken = [row["id"] for settings in config for row in load(Source(**settings))]
    assert sorted(taken) == list(range(57))
    assert len(asked) == 1


@pytest.mark.parametrize("stage", PAPER)
def test_the_stage_file_holds_the_papers_numbers(stage):
    config = composed(f"stage/{stage}.yaml")
    for key, expected in PAPER[stage].items():
        found = init_arg(config, key)
        assert (found, type(found)) == (expected, type(expected)), key


def test_a_printed_config_runs_the_same_from_elsewhere(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    leaf = CONFIGS / "sft_tiny.yaml"
    Path("saved.yaml").write_text(printed(capsys, "fit", leaf))
    losses = []
    for config, run in ((leaf, "runs/leaf"), ("saved.yaml", "runs/saved")):
        assert cli.main(["fit", "--config", str(config), f"--trainer.default_root_dir={run}"]) == 0
        losses.append([json.loads(line)["loss"] for line in Path(run, "metrics.jsonl").read_text().splitlines()])
    assert len(losses[0]) == 6  # 96 rows, 16 a step
    assert losses[0] == losses[1]
