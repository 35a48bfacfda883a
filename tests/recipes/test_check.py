"""A recipe's mistakes are found before its first stage runs."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from tulu_lightning.errors import InputError
from tulu_lightning.launch.parsed import processes
from tulu_lightning.recipes.check import fill
from tulu_lightning.recipes.recipe import main

CONFIGS = Path(__file__).parents[2] / "configs"
WITHOUT_PROMOTE = "trainer.callbacks=[{{class_path: tulu_lightning.callbacks.records.Records}}]"

OWN = "tulu_lightning.callbacks."


def promotes(promote, evaluate):
    """A stage's callbacks, as an entry of `set`."""
    names = {
        "records.Records": "",
        "refresh.RolloutRefresh": "",
        "evaluate.Evaluate": evaluate,
        "promote.Promote": promote,
    }
    listed = ", ".join(f"{{class_path: {OWN}{name}, init_args: {{{args}}}}}" for name, args in names.items())
    return f"trainer.callbacks=[{listed}]".replace("{", "{{").replace("}", "}}")


GSM8K = r"stage 'ppo', promotion\.gains: the rule names 'gsm8', which Evaluate does not score\. Did you mean 'gsm8k'"


def run(tmp_path, *settings, config=None):
    """The tiny recipe, its last stage with these settings or this config."""
    stages = [{"name": name, "fit": str(CONFIGS / f"{name}_tiny.yaml")} for name in ("sft", "dpo", "ppo")]
    stages[-1] |= {"set": list(settings)} | ({"fit": str(config)} if config else {})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "run": str(tmp_path / "run"), "stages": stages}))
    return main(["--config", str(path)])


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.init_args.epoch=2", r"no such option: 'model\.init_args\.epoch'.*epochs"),
        ("model.init_args.epochs=two", "epochs.*is 'two'.*whole number"),
        ("data.init_args.seed={sed}", r"stage 'ppo': .*'data\.init_args\.seed=\{sed\}'.*\{run\} and \{seed\}"),
        ("data.init_args.seed={", "stage 'ppo': .*plain braces"),
        (WITHOUT_PROMOTE, "stage 'ppo': there is no Promote callback"),
        (promotes("rule: {gains: {gsm8: 0.0}}", "suite: {tasks: [gsm8k, ifeval]}"), GSM8K),
        (promotes("when: each", "suite: {tasks: [gsm8k]}"), "Evaluate scores only before and after the run"),
        (promotes("rule: {confidence: 95}", "suite: {tasks: [gsm8k]}"), "confidence: is 95"),
        (promotes("when: last", "suite: {tasks: [gsm8]}"), "there is no task or suite 'gsm8'.*gsm8k"),
        ("trainer.devices=2", "stage 'ppo': asks for 2 processes"),
        ("trainer.num_nodes=3", "stage 'ppo': asks for 3 processes"),
    ],
)
def test_a_mistake_in_the_last_stage_is_found_before_the_first_runs(setting, said, tmp_path):
    with pytest.raises(InputError, match=said):
        run(tmp_path, setting)
    assert not (tmp_path / "run").exists()


def test_a_typo_in_the_last_stages_file_is_found_with_its_line(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(f"include: [{CONFIGS / 'ppo_tiny.yaml'}]\nmodel:\n  init_args:\n    value_cofficient: 0.1\n")
    with pytest.raises(InputError, match=r"mine\.yaml.*4.*value_cofficient.*value_coefficient"):
        run(tmp_path, config=config)
    assert not (tmp_path / "run").exists()


def test_a_typo_in_a_pairs_config_is_found_too(tmp_path):
    pairs = tmp_path / "pairs.yaml"
    pairs.write_text("output: o\ngenerate: {model: m, sources: [], response: 2}\njudge: {verify: true}\n")
    first = {"name": "sft", "fit": str(CONFIGS / "sft_tiny.yaml")}
    recipe = {"name": "r", "run": str(tmp_path / "run"), "stages": [first, {"name": "pairs", "pairs": str(pairs)}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(InputError, match=r"generate\.response.*generate\.responses"):
        main(["--config", str(tmp_path / "recipe.yaml")])
    assert not (tmp_path / "run").exists()


def test_without_plotly_nothing_starts(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "plotly" else find(name, *a))
    with pytest.raises(InputError, match=r"plotly, which is not installed.*demo"):
        run(tmp_path)
    assert not (tmp_path / "run").exists()


def test_placeholders_are_filled_and_double_braces_are_plain():
    assert fill("here", ["a={seed}", "b={{x: {run}}}"], run="r", seed=3) == ["a=3", "b={x: r}"]


@pytest.mark.parametrize(
    ("accelerator", "devices", "nodes", "count"),
    [
        ("auto", 1, 1, 1),
        ("auto", "1", 2, 2),
        ("auto", 4, 2, 8),
        ("gpu", [0, 3], 1, 2),
        ("gpu", [3], 1, 1),
        ("gpu", "0,", 1, 1),
        ("gpu", "0,1", 1, 2),
        ("cpu", "auto", 1, 1),
        ("auto", "auto", 1, 8),
        ("gpu", -1, 1, 8),
    ],
)
def test_processes_are_devices_by_nodes(accelerator, devices, nodes, count, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert processes(accelerator, devices, nodes) == count
