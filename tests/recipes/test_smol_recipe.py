"""The demo's own configs on the real SmolLM2, cut to a few steps a stage: every part of `make demo` in two minutes."""

import json

import pytest
import yaml

from tulu_lightning.cli import main
from tulu_lightning.evaluation.heldout import Scores


@pytest.mark.slow
def test_the_demos_recipe_runs_short_on_the_real_model(smol, tmp_path, monkeypatch, request, capsys):
    configs = request.config.rootpath / "configs"
    monkeypatch.chdir(tmp_path)
    short = ["data.init_args.max_steps=2"]
    stages = [
        {"name": "sft", "fit": str(configs / "sft_smol.yaml"), "set": short},
        {"name": "pairs", "pairs": str(configs / "pairs_smol.yaml"), "set": ["generate.responses=4"]},
        {
            "name": "dpo",
            "fit": str(configs / "dpo_smol.yaml"),
            "set": [*short, "data.init_args.sources=[{{name: on-policy, path: '{run}/pairs/pairs.jsonl'}}]"],
        },
        {"name": "ppo", "fit": str(configs / "ppo_smol.yaml"), "set": [*short, "data.init_args.examples_per_step=4"]},
    ]
    recipe = {"name": "short", "run": "run", "seed": 1, "on_reject": "continue", "stages": stages}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["recipe", "--config", "short.yaml"]) == 0
    assert "report: run/report.html" in capsys.readouterr().out
    for name in ("sft", "dpo", "ppo"):
        before, after = (
            Scores.from_json(tmp_path / "run" / name / "scores" / f"{w}.json") for w in ("before", "after")
        )
        assert before.n == after.n == 300
        assert before.settings == after.settings
        summary = json.loads((tmp_path / "run" / name / "summary.json").read_text())
        assert summary["steps"] == 2
        assert summary["decision"]["difference"] == pytest.approx(after.accuracy - before.accuracy, abs=1e-9)
    lines = [json.loads(line) for line in (tmp_path / "run" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["first_ratio_error"] == 0 for line in lines)
    assert all(line["mismatch_kl"] < 0.05 for line in lines)
