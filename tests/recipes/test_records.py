import json

import pytest

from tulu_lightning.errors import InputError
from tulu_lightning.recipes.reading import number
from tulu_lightning.recipes.records import read_run


def stage(run, name):
    return next(s for s in run.stages if s.name == name)


def test_a_finished_run_is_read_whole(run_dir):
    run = read_run(run_dir)
    assert [s.name for s in run.stages] == ["sft", "pairs", "dpo", "ppo"]
    assert {s.status for s in run.stages} == {"finished"}
    assert [len(s.metrics) for s in run.stages] == [40, 0, 50, 60]
    assert stage(run, "ppo").after.accuracy == 0.68
    assert stage(run, "ppo").decision.difference == 0.23
    assert stage(run, "sft").total("tokens") == 123456
    assert run.seeds == {"seed": 1}
    assert run.notes == ()


def test_a_torn_last_line_is_left_out_and_noted(run_dir):
    path = run_dir / "ppo" / "metrics.jsonl"
    path.write_text(path.read_text()[:-30])
    run = read_run(run_dir)
    assert len(stage(run, "ppo").metrics) == 59
    assert run.notes == ("ppo/metrics.jsonl: 1 torn line was left out.",)


def test_a_step_that_ran_again_after_a_resume_counts_once_and_the_later_line_wins(run_dir):
    path = run_dir / "sft" / "metrics.jsonl"
    rows = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 2.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 4.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["loss"] for row in stage(read_run(run_dir), "sft").metrics] == [1.0, 3.0, 4.0]


def test_values_that_are_not_finite_are_dropped_and_named(run_dir):
    (run_dir / "dpo" / "metrics.jsonl").write_text('{"step": 0, "loss": NaN, "margin": 1, "note": "text"}\n')
    run = read_run(run_dir)
    assert stage(run, "dpo").metrics == ({"step": 0.0, "margin": 1.0},)
    assert run.notes == ("dpo/metrics.jsonl: not finite in some steps, and not drawn there: loss.",)


def test_a_stage_without_a_summary_is_unfinished_and_sums_its_own_steps(run_dir):
    (run_dir / "sft" / "summary.json").unlink()
    (run_dir / "sft" / "metrics.jsonl").write_text('{"step": 0, "tokens": 5}\n{"step": 1, "tokens": 7}\n')
    sft = stage(read_run(run_dir), "sft")
    assert sft.status == "unfinished"
    assert sft.total("tokens") == 12
    assert sft.total("seconds") is None
    assert sft.decision is None


def test_a_planned_stage_without_a_folder_has_not_started(tmp_path):
    (tmp_path / "recipe.json").write_text('{"name": "r", "stages": ["sft", "../elsewhere", 3]}')
    run = read_run(tmp_path)
    assert [(s.name, s.status) for s in run.stages] == [("sft", "not started")]


def test_without_recipe_json_the_stage_folders_speak(run_dir):
    (run_dir / "recipe.json").write_text('{"name": "smo')
    run = read_run(run_dir)
    assert {s.name for s in run.stages} == {"sft", "pairs", "dpo", "ppo"}
    assert run.name == "smol"
    assert "recipe.json" in run.notes[0]


def test_scores_with_different_settings_are_flagged(run_dir):
    path = run_dir / "sft" / "scores" / "after.json"
    path.write_text(path.read_text().replace("a1b2c3", "other"))
    assert "do not compare" in read_run(run_dir).notes[0]


def test_the_length_and_score_of_every_answer_are_read_in_the_order_of_the_prompts(run_dir):
    answers = stage(read_run(run_dir), "dpo").after.answers
    assert [a.tokens for a in answers[:6]] == [3, 4, 6, 9, 40, 3]
    assert [a.cut for a in answers[:6]] == [False] * 4 + [True, False]
    assert sum(a.score for a in answers) == 135  # 45% of 300


@pytest.mark.parametrize(
    "item", [{}, {"tokens": 3, "score": None}, {"tokens": -1, "score": 0}, {"tokens": 3, "score": 2}, 7]
)
def test_a_file_with_an_answer_that_has_no_length_or_score_shows_none_by_length(run_dir, item):
    path = run_dir / "dpo" / "scores" / "after.json"
    value = json.loads(path.read_text())
    value["items"][17] = item
    path.write_text(json.dumps(value))
    run = read_run(run_dir)
    assert stage(run, "dpo").after.answers == ()
    assert stage(run, "dpo").after.accuracy == 0.45, "the rest is read all the same"
    assert run.notes == (
        "dpo/scores/after.json: an answer in it has no length or no score, so none is shown by length.",
    )


def test_pairs_of_an_older_version_are_measured_from_their_file(run_dir):
    made = stage(read_run(run_dir), "pairs").pair_lengths
    assert made == (212, 3.25, 5.5, 0.125, 0.5)
    path = run_dir / "pairs" / "summary.json"
    summary = json.loads(path.read_text())
    del summary["lengths"]
    path.write_text(json.dumps(summary))
    assert stage(read_run(run_dir), "pairs").pair_lengths is None, "there is no such file"
    rows = [
        {"chosen_ids": [1, 2], "rejected_ids": [1, 2, 3]},
        {"chosen_ids": [4], "rejected_ids": [5]},
        {"chosen": "x"},
    ]
    (run_dir / "pairs" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert stage(read_run(run_dir), "pairs").pair_lengths == (2, 1.5, 2.0, 0.0, 0.5)
    assert stage(read_run(run_dir), "dpo").pair_lengths is None


def test_two_rollouts_a_step_and_outcome_are_kept(run_dir):
    row = {"step": 3, "prompt": "p", "response": "r", "outcome": "right"}
    rows = [row] * 5 + [{**row, "outcome": "wrong"}]
    (run_dir / "ppo" / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert [r.outcome for r in read_run(run_dir).rollouts] == ["right", "right", "wrong"]


def test_rollouts_of_every_stage_are_read_in_the_order_of_the_stages(run_dir):
    row = {"step": 0, "prompt": "p", "response": "r", "outcome": "right"}
    (run_dir / "zero").mkdir()
    for name in ("zero", "ppo"):
        (run_dir / name / "rollouts.jsonl").write_text(json.dumps(row) + "\n")
    (run_dir / "zero" / "metrics.jsonl").write_text('{"step": 0}\n')
    assert [r.stage for r in read_run(run_dir).rollouts] == ["ppo", "zero"]


def test_the_folder_of_one_stage_is_a_run_of_that_stage(run_dir):
    whole, alone = read_run(run_dir), read_run(run_dir / "ppo")
    assert alone.name == "ppo"
    assert alone.stages == (stage(whole, "ppo"),)
    assert alone.rollouts == whole.rollouts
    assert alone.notes == ()


def test_a_start_with_other_packages_is_noted(run_dir):
    path = run_dir / "recipe.json"
    recipe = json.loads(path.read_text())
    same = {"time": "2026-11-23", "versions": recipe["versions"]}
    other = {"time": "2026-11-24", "versions": {**recipe["versions"], "torch": "2.14.0", "new": "1"}}
    path.write_text(json.dumps({**recipe, "starts": [same, other, "torn"]}))
    assert read_run(run_dir).notes == ("Started again 2026-11-24 with other packages: torch 2.14.0.",)


@pytest.mark.parametrize("value", [None, True, "1", float("nan"), float("inf"), 10**400, [1]])
def test_only_finite_numbers_are_numbers(value):
    assert number(value) is None


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="nor a stage"):
        read_run(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        read_run(tmp_path / "missing")
