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
MAKING = {
    path: path.stem.partition("_")[0]
    for name in ("pairs", "synthesize", "prompts")
    for path in sorted(CONFIGS.glob(f"{name}_*.yaml"))
}
"""Configs of commands that make data, with the command."""
FITS = sorted(set(CONFIGS.glob("*_*.yaml")) - set(MAKING))
CALLBACKS = "tulu_lightning.callbacks."


@pytest.fixture(autouse=True)
def key(monkeypatch):
    """Configs that ask a server by a key refuse to start without it."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")


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
    leaves = {*FITS, *MAKING, *RECIPES}
    tried = {layer.path for leaf in leaves for layer in compose(leaf)}
    against = (
        CONFIGS / "data" / "tulu3_evaluations.yaml"
    )  # no layer of a run; tests/data/test_decontaminate.py reads it
    assert tried | {against} == set(CONFIGS.rglob("*.yaml"))
    assert {path.stem for path in FITS} >= {
        *(f"{stage}_{size}" for stage in ("sft", "dpo", "ppo", "grpo") for size in ("tiny", "smol")),
        *(f"{stage}_{size}" for stage in ("sft", "dpo") for size in ("8b", "70b", "405b")),
        *(f"reward_{size}" for size in ("tiny", "8b")),
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


@pytest.mark.parametrize("path", MAKING, ids=ids(list(MAKING)))
def test_a_config_of_data_parses_and_what_is_printed_stands_alone(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("saved.yaml").write_text(text := printed(capsys, MAKING[path], path))
    assert printed(capsys, MAKING[path], "saved.yaml") == text


@pytest.mark.parametrize("path", RECIPES, ids=ids(RECIPES))
def test_a_recipe_parses_with_every_stage_as_it_will_start_it(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(printed(capsys, "recipe", path))
    for stage in recipe["stages"]:
        command = "fit" if stage["fit"] else "pairs"
        options = ["--" + item.format(run="runs/x", seed=7) for item in stage["set"]]
        config = yaml.safe_load(printed(capsys, command, path.parent / stage[command], *options))
        if stage["set"]:
            seeds = config["generate"]["seed"] if command == "pairs" else config["data"]["init_args"]["seed"]
            assert seeds == 7


@pytest.mark.parametrize("path", FITS, ids=ids(FITS))
def test_a_stage_records_saves_and_promotes(path):
    """Lists are replaced, not merged: a leaf that changes one callback has to name them all."""
    callbacks = composed(path.name)["trainer"]["callbacks"]
    names = [callback["class_path"].removeprefix(CALLBACKS) for callback in callbacks]
    assert {"records.Records", "checkpoints.Checkpoints", "promote.Promote"} <= set(names)
    assert ("refresh.RolloutRefresh" in names) == path.stem.startswith(("ppo", "grpo"))
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
        "model.loss.class_path": "tulu_lightning.core.preference.DPO",
        "model.loss.init_args.beta": 5.0,
        "model.loss.init_args.length_normalised": True,
        "model.optimizer.lr": 5e-7,
        "model.optimizer.schedule": "linear",
        "model.optimizer.warmup_ratio": 0.1,
        "model.optimizer.weight_decay": 0.0,
        "data.examples_per_step": 128,
        "data.epochs": 1,
        "data.max_tokens": 2048,
    },
    "reward": {  # table 36; eps is the release's
        "model.optimizer.lr": 3e-6,
        "model.optimizer.schedule": "linear",
        "model.optimizer.eps": 1e-5,
        "model.optimizer.max_grad_norm": 1.0,
        "data.examples_per_step": 256,
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
        "model.overlong.kind": "penalty",
        "model.overlong.penalty": -10.0,
        "model.kl.coefficient": 0.05,
        "model.kl.place": "reward",
        "model.kl.estimator": "k1",
        "model.correction.kind": "none",
        "model.policy_loss.clip_low": 0.2,
        "model.policy_loss.clip_high": 0.2,
        "model.value_loss.clip": 0.2,
        "model.value_coefficient": 0.1,
        "model.advantage.class_path": "tulu_lightning.core.estimators.GAE",
        "model.advantage.init_args.gamma": 1.0,
        "model.advantage.init_args.lam": 0.95,
        "model.epochs": 4,
        "model.mini_batches": 1,
        "data.examples_per_step": 224,
        "data.max_tokens": 2048,
    },
    "grpo": {  # Tülu 3.1 8B, the original run
        "model.optimizer.lr": 5e-7,
        "model.optimizer.schedule": "constant",
        "model.advantage.class_path": "tulu_lightning.core.groups.GRPO",
        "model.advantage.init_args.eps": 1e-8,
        "model.rollout.samples_per_prompt": 16,
        "model.rollout.temperature": 1.0,
        "model.rollout.max_new_tokens": 2048,
        "model.reward.right": 10.0,
        "model.overlong.kind": "penalty",
        "model.overlong.penalty": 0.0,
        "model.kl.coefficient": 0.01,
        "model.kl.place": "loss",
        "model.kl.estimator": "k3",
        "model.correction.kind": "none",
        "model.policy_loss.clip_low": 0.2,
        "model.policy_loss.clip_high": 0.2,
        "model.epochs": 1,
        "model.mini_batches": 2,
        "data.examples_per_step": 48,
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


def strategy(size: str):
    """fsdp2 by its name, or with sizes of its mesh."""
    if size != "405b":
        return "fsdp2"
    return {"class_path": "tulu_lightning.models.sharding.Fsdp2", "init_args": {"tensor_parallel": 8}}


@pytest.mark.parametrize("size", SIZES)
def test_a_full_size_sft_config_holds_the_papers_numbers(size):
    config = composed(f"sft_{size}.yaml")
    for key, expected in {**ALL_SIZES, **SIZES[size]}.items():
        if key == "gpus":
            assert config["trainer"]["devices"] * config["trainer"]["num_nodes"] == expected
        else:
            assert (init_arg(config, key), type(init_arg(config, key))) == (expected, type(expected)), key
    assert config["trainer"]["strategy"] == strategy(size)
    assert config["seed_everything"] == SIZES[size].get("data.seed", 1)
    (source,) = init_arg(config, "data.sources")
    assert source == {"name": "tulu3", "hub": "allenai/tulu-3-sft-mixture"}


DPO_SIZES = {  # tables 20 (8B, 70B) and 34 (405B); section 5.4.1 and, for the 405B, the release's command (GPUs)
    "8b": {
        "model.backbone.path": "allenai/Llama-3.1-Tulu-3-8B-SFT",
        "model.optimizer.lr": 5e-7,
        "data.examples_per_step": 128,
        "gpus": 8,
    },
    "70b": {
        "model.backbone.path": "allenai/Llama-3.1-Tulu-3-70B-SFT",
        "model.optimizer.lr": 2e-7,
        "data.examples_per_step": 128,
        "gpus": 64,
    },
    "405b": {
        "model.backbone.path": "allenai/Llama-3.1-Tulu-3-405B-SFT",
        "model.optimizer.lr": 2e-7,
        "data.examples_per_step": 256,
        "gpus": 256,
    },
}
ALL_DPO_SIZES = {  # of every size: eq. 6 with β = 5, linear to 0, 10% warm-up, no decay, 1 epoch, 2,048 tokens
    **{key: PAPER["dpo"][key] for key in PAPER["dpo"] if key not in ("model.optimizer.lr", "data.examples_per_step")},
    "model.backbone.compute_dtype": "bfloat16",
    "model.backbone.weights_dtype": None,  # fp32: at these rates updates of bf16 weights round away
    "model.backbone.activation_checkpointing": True,
    "data.template": "tulu",
    "data.on_overflow": "truncate",
}
TABLE_15 = {  # pairs by part
    "sft-reused-on-policy": 19_444,
    "sft-reused-off-policy": 96_911,
    "if-augmented": 65_530,
    "wildchat-if": 10_792,
    "wildchat-reused": 17_207,
    "wildchat-unused": 82_783,
    "ultrafeedback": 41_635,
    "persona-if": 19_890,
}
RELEASED_70B = {  # where the sets on the hub have other numbers than the table
    "sft-reused-on-policy": 19_453,
    "if-augmented": 65_551,
    "wildchat-if": 10_793,
    "wildchat-reused": 17_242,
    "ultrafeedback": 41_634,
}


@pytest.mark.parametrize("size", DPO_SIZES)
def test_a_full_size_dpo_config_holds_the_papers_numbers(size):
    config = composed(f"dpo_{size}.yaml")
    for key, expected in {**ALL_DPO_SIZES, **DPO_SIZES[size]}.items():
        if key == "gpus":
            assert config["trainer"]["devices"] * config["trainer"]["num_nodes"] == expected
        else:
            assert (init_arg(config, key), type(init_arg(config, key))) == (expected, type(expected)), key
    assert config["trainer"]["strategy"] == strategy(size)
    (source,) = init_arg(config, "data.sources")
    assert source == {
        "name": f"tulu3-preferences-{size}",
        "hub": f"allenai/llama-3.1-tulu-3-{size}-preference-mixture",
    }


def test_what_is_printed_of_dpo_8b_shows_every_setting_of_the_paper(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(printed(capsys, "fit", CONFIGS / "dpo_8b.yaml"))
    for key, expected in {**PAPER["dpo"], **DPO_SIZES["8b"]}.items():
        if key != "gpus":
            assert init_arg(config, key) == expected, key


def test_the_8b_reward_model_holds_the_papers_numbers():
    """Table 36: the SFT model, the 8B's pairs, 8 GPUs (section 6.3); the held-out pairs are the release's."""
    config = composed("reward_8b.yaml")
    for key, expected in {**PAPER["reward"], "data.template": "tulu", "data.on_overflow": "truncate"}.items():
        assert (init_arg(config, key), type(init_arg(config, key))) == (expected, type(expected)), key
    assert init_arg(config, "model.backbone.path") == "allenai/Llama-3.1-Tulu-3-8B-SFT"
    assert config["trainer"]["devices"] * config["trainer"]["num_nodes"] == 8
    assert init_arg(config, "data.sources") == init_arg(composed("dpo_8b.yaml"), "data.sources")
    (held_out,) = init_arg(config, "data.validation")
    assert (held_out["hub"], held_out["split"]) == ("allenai/ultrafeedback_binarized_cleaned", "test_prefs")


def test_the_papers_preference_mixtures_add_up():
    parts = {
        size: {s["name"]: s["cap"] for s in init_arg(composed(f"dpo_{size}_by_source.yaml"), "data.sources")}
        for size in ("8b", "70b")
    }
    assert parts["8b"] == {name: pairs for name, pairs in TABLE_15.items() if name != "wildchat-unused"}
    assert sum(parts["8b"].values()) == 271_409
    table_70b = {name: pairs for name, pairs in TABLE_15.items() if name != "persona-if"}
    assert sum(table_70b.values()) == 334_302
    assert parts["70b"] == {**table_70b, **RELEASED_70B}
    assert sum(parts["70b"].values()) == 334_367
    assert sum(TABLE_15.values()) == 354_192


@pytest.mark.parametrize("size", ["8b", "70b"])
def test_on_policy_parts_are_those_of_their_own_model(size):
    sources = init_arg(composed(f"dpo_{size}_by_source.yaml"), "data.sources")
    hubs = {source["name"]: source["hub"] for source in sources}
    assert len(set(hubs.values())) == 7
    for name in ("sft-reused-on-policy", "if-augmented", "wildchat-if", "wildchat-reused", "ultrafeedback"):
        assert hubs[name].endswith(f"-on-policy-{size}")


def test_the_8b_fits_one_device_with_adapters():
    """The comment's arithmetic: 16 bytes for each of the adapters' weights, 2 for each of the base's, nothing twice."""
    config = composed("dpo_8b_lora.yaml")
    backbone = init_arg(config, "model.backbone")
    assert (backbone["weights_dtype"], backbone["activation_checkpointing"]) == ("bfloat16", True)
    assert (config["trainer"]["devices"], config["trainer"]["num_nodes"]) == (1, 1)
    assert config["trainer"]["strategy"] == "auto"
    width, inner, kv, vocabulary, layers, rank = 4096, 14336, 1024, 128_264, 32, backbone["lora"]["r"]
    matrices = [(width, width)] * 2 + [(width, kv)] * 2 + [(width, inner)] * 3
    base = layers * sum(a * b for a, b in matrices) + 2 * vocabulary * width + (2 * layers + 1) * width
    adapters = layers * rank * sum(a + b for a, b in matrices)
    assert base == pytest.approx(8.03e9, rel=1e-3)
    assert adapters == pytest.approx(1.68e8, rel=2e-3)
    assert 2 * base / 1e9 == pytest.approx(16.1, abs=0.05)
    assert 16 * adapters / 1e9 == pytest.approx(2.7, abs=0.05)


@pytest.mark.parametrize(
    ("name", "shape", "said", "devices"),
    [  # width, inner, kv, vocabulary, layers; numbers in matrices, in the rest, in adapters; GB of the three
        ("sft_8b", (4096, 14336, 1024, 128_256, 32), ("6.98e9", "1.05e9", "1.68e8", "3.6", "2.1", "1.7"), 1),
        ("dpo_70b", (8192, 28672, 1024, 128_264, 80), ("68.5e9", "2.10e9", "8.28e8", "35.3", "4.2", "8.3"), 8),
    ],
)
def test_4_bit_bases_take_what_their_comments_say(name, shape, said, devices):
    """0.516 bytes for each number in a matrix, 2 for each of the rest, 10 for each of the adapters'."""
    path = CONFIGS / f"{name}_qlora.yaml"
    config, whole = composed(path.name), composed(f"{name}.yaml")
    backbone = init_arg(config, "model.backbone")
    assert (backbone["weights_dtype"], backbone["activation_checkpointing"]) == ("bfloat16", True)
    assert backbone["quantize"] == {"kind": "nf4"}
    assert (config["trainer"]["devices"], config["trainer"]["num_nodes"]) == (devices, 1)
    assert config["trainer"]["strategy"] == ("auto" if devices == 1 else "fsdp2")
    own, papers = (init_arg(c, "model.optimizer") for c in (config, whole))
    assert own == {**papers, "lr": pytest.approx(10 * papers["lr"]), "state_bits": 8}
    assert config["data"] == whole["data"]
    width, inner, kv, vocabulary, layers = shape
    matrices = [(width, width)] * 2 + [(width, kv)] * 2 + [(width, inner)] * 3
    base, rest = layers * sum(a * b for a, b in matrices), 2 * vocabulary * width + (2 * layers + 1) * width
    adapters = layers * backbone["lora"]["r"] * sum(a + b for a, b in matrices)
    text = path.read_text(encoding="utf-8")
    for found, words in zip((base, rest, adapters, 0.516e-9 * base, 2e-9 * rest, 1e-8 * adapters), said, strict=True):
        assert f" {words}" in text
        assert found == pytest.approx(float(words), rel=0.015)


LOSS = "tulu_lightning.core.preference."


@pytest.mark.parametrize(
    ("name", "fault", "nearest"),
    [
        ("SimP0", "there is no class 'SimP0'", "SimPO"),
        (f"{LOSS}SimPo", f"there is no class '{LOSS}SimPo' ({LOSS[:-1]} has no 'SimPo')", "SimPO"),
        ("ConservativDPO", "there is no class 'ConservativDPO'", "ConservativeDPO"),
        ("Dpo", "there is no class 'Dpo'", "DPO"),
    ],
)
@pytest.mark.parametrize("way", ["file", "option"])
def test_a_loss_name_with_a_typo_offers_the_nearest(name, fault, nearest, way, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"model": {"init_args": {"loss": {"class_path": name}}}}
    Path("mine.yaml").write_text(yaml.safe_dump({"include": str(CONFIGS / "dpo_tiny.yaml"), **settings}))
    options = ["--config", "mine.yaml"]
    where = "mine.yaml, line 5 (model.init_args.loss.class_path)"
    if way == "option":
        options = ["--config", str(CONFIGS / "dpo_tiny.yaml"), f"--model.init_args.loss={name}"]
        where = "command line (model.init_args.loss)"
    assert cli.main(["fit", *options, "--print_config"]) == 2
    said = capsys.readouterr().err
    assert f"{where}: {fault}. Did you mean '{LOSS}{nearest}'?" in said


@pytest.mark.parametrize("way", ["file", "option"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SimPO", {"beta": 2.0, "gamma": 1.0, "length_normalised": True}),
        ("IPO", {"beta": 0.1, "length_normalised": False}),
        ("DPO", {"beta": 5.0, "length_normalised": True}),
    ],
)
def test_another_loss_starts_from_its_own_defaults(name, settings, way, capsys, tmp_path, monkeypatch):
    """β = 5 belongs to length-normalised DPO: the stage's file must not lend it to the loss that a leaf names."""
    monkeypatch.chdir(tmp_path)
    chosen = {"model": {"init_args": {"loss": {"class_path": LOSS + name}}}}
    Path("mine.yaml").write_text(yaml.safe_dump({"include": str(CONFIGS / "dpo_tiny.yaml"), **chosen}))
    config, options = ("mine.yaml", []) if way == "file" else (CONFIGS / "dpo_tiny.yaml", [f"--model.loss={name}"])
    found = yaml.safe_load(printed(capsys, "fit", config, *options))["model"]["init_args"]["loss"]
    assert found == {"class_path": LOSS + name, "init_args": settings}
    more = yaml.safe_load(printed(capsys, "fit", config, *options, "--model.loss.beta=0.7"))
    assert more["model"]["init_args"]["loss"]["init_args"] == {**settings, "beta": 0.7}


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


@pytest.mark.parametrize(
    ("config", "option", "key"),
    [
        ("ppo_tiny.yaml", "--model.critic.layers=null", ("critic", "layers")),
        ("ppo_tiny.yaml", "--model.init_args.critic.path=null", ("critic", "path")),
        ("dpo_8b_lora.yaml", "--model.backbone.lora=null", ("backbone", "lora")),
        ("dpo_tiny.yaml", "--model.reference.folder=null", ("reference", "folder")),
    ],
)
def test_null_on_the_command_line_is_null_however_deep(config, option, key, capsys):
    given = ["--model.reference.folder=somewhere"] if key[0] == "reference" else []
    assert cli.main(["fit", "--config", str(CONFIGS / config), *given, option, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert printed[key[0]][key[1]] is None
