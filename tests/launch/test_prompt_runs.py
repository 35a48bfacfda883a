"""Prompts through the commands: what `tulu data inspect` shows of them, and a run whose rows have several checks."""

import json
from pathlib import Path

import pytest
import yaml

from tulu_lightning import cli

CONFIGS = Path(__file__).parents[2] / "configs"
OWN = {"class_path": "tulu_lightning.verifiers.last_number.LastNumber"}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Rows with two checks and rows with a routed data set, through verifiers of the config's own."""
    monkeypatch.chdir(tmp_path)
    checks = [{"verifier": "digits"}, {"verifier": "exact", "ground_truth": "six", "weight": 0.5}]
    several = {"messages": [{"role": "user", "content": "3 + 3?"}], "ground_truth": "6", "checks": checks}
    routed = {"messages": [{"role": "user", "content": "2 + 2?"}], "ground_truth": "4", "dataset": "sums"}
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [several, routed] * 4))
    data = {
        "sources": [{"name": "mine", "path": "rows.jsonl"}],
        "verifiers": {"digits": OWN},
        "routes": {"sums": "digits"},
        "max_steps": 2,
    }

    def write(**changes):
        settings = {"include": str(CONFIGS / "ppo_tiny.yaml"), "data": {"init_args": {**data, **changes}}}
        Path("mine.yaml").write_text(yaml.safe_dump(settings))
        return "mine.yaml"

    return write


def test_a_prompt_is_shown_with_what_judges_its_answers(config, capsys):
    assert cli.main(["data", "inspect", "--config", config(), "--row", "0", "--colour", "never"]) == 0
    assert "<|user|>\n3 + 3?\n<|assistant|>\n\njudged by digits: 6\njudged by exact, weight 0.5: six\n" in (
        capsys.readouterr().out
    )
    assert cli.main(["data", "inspect", "--config", config(), "--row", "1", "--colour", "never"]) == 0
    assert "\njudged by digits: 4\n" in capsys.readouterr().out


def test_a_run_on_such_prompts_ends_and_goes_on_with_the_same_verifiers_only(config, capsys):
    argv = ["fit", "--config", config(), "--trainer.default_root_dir=run"]
    assert cli.main(argv) == 0
    rows = Path("run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]
    assert json.loads(Path("run/data_manifest.json").read_text())["settings"]["verifiers"]["digits"].endswith(
        "LastNumber()"
    )
    config(verifiers={"digits": {"class_path": "tulu_lightning.verifiers.exact.Exact"}})
    capsys.readouterr()
    assert cli.main(argv) == 2
    assert "data rows was" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["fit"], ["data", "inspect"], ["data", "stats"]], ids=" ".join)
def test_what_an_own_verifier_refuses_is_said_in_its_own_words(command, config, capsys):
    judge = {"url": "http://127.0.0.1:9", "model": "m", "rubric": "Is this kind?"}
    own = {"digits": {"class_path": "tulu_lightning.verifiers.judge.Judge", "init_args": judge}}
    assert cli.main([*command, "--config", config(verifiers=own)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("tulu: error: judge.rubric: has no {response}. Write")
