"""The report's sections besides curves: scores by checkpoint, answers side by side, cost, data, settings, two runs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from made_run import dump, scores, write_run
from pages import Page, traces_of

from tulu_lightning.core.gain import Paired, gain
from tulu_lightning.evaluation.result import TaskResult, compare_results
from tulu_lightning.recipes.records import RunRecord, Scores, StageRecord, read_run
from tulu_lightning.recipes.report import main, render
from tulu_lightning.recipes.report_alerts import find_alerts
from tulu_lightning.recipes.report_changes import Change, between_runs, from_files, leaves
from tulu_lightning.recipes.report_charts import plotly_js, score_curves, stage_charts
from tulu_lightning.recipes.report_compare import pairing
from tulu_lightning.recipes.report_cost import phases
from tulu_lightning.recipes.report_data import data_part
from tulu_lightning.recipes.report_samples import Column, columns, pick_prompts, samples_section
from tulu_lightning.recipes.report_tasks import checkpoints, compared, matched, task_table
from tulu_lightning.recipes.score_records import Sample, paired_gain, read_scores

EMPTY = StageRecord("sft", None, (), None, None, None, None)


def page_of(run, against=None) -> Page:
    return Page(render(run, against).replace(plotly_js(), ""))


def run_of(*stages: StageRecord, name: str = "r") -> RunRecord:
    return RunRecord(Path(name), name, "", "", {}, {}, stages, (), ())


def task(accuracy: float, settings: str = "a", **more) -> Scores:
    return Scores(accuracy, accuracy - 0.1, accuracy + 0.1, 50, None, settings, **more)


def test_the_records_hold_what_was_scored_in_between_and_validated(run_dir):
    run = read_run(run_dir)
    dpo = run.stages[2]
    assert [step for step, _ in dpo.between] == [10, 20, 30, 40]
    assert [row["step"] for row in dpo.validation] == [10.0, 20.0, 30.0, 40.0, 50.0]
    assert dpo.after.samples[0].prompt == "What is 31+27?"
    assert len(dpo.after.per_item) == 300
    assert run.notes == ()


def test_scores_of_other_tasks_are_found_in_a_folder_of_either_order(run_dir):
    value = {"summary": {"task": "gsm8k", "score": 0.25, "interval": [0.2, 0.3], "n": 80}, "task": "gsm8k", "items": []}
    dump(run_dir / "sft" / "scores" / "after" / "anything.json", value)
    dump(run_dir / "sft" / "scores" / "math" / "before.json", {"summary": {"score": 0.5, "n": 10}})
    dump(run_dir / "sft" / "scores" / "notes.json", {"summary": {"score": 0.5, "n": 10}})
    tasks = read_run(run_dir).stages[0].tasks
    assert {when: sorted(found) for when, found in tasks.items()} == {"after": ["gsm8k"], "before": ["math"]}
    assert (tasks["after"]["gsm8k"].accuracy, tasks["after"]["gsm8k"].n) == (0.25, 80)


def test_a_line_a_task_a_column_a_checkpoint_and_the_best_in_bold():
    sft = EMPTY._replace(
        before=task(0.1, task="held"), after=task(0.4, task="held"), tasks={"after": {"gsm8k": task(0.2)}}
    )
    dpo = EMPTY._replace(name="dpo", after=task(0.3, task="held"), tasks={"after": {"gsm8k": task(0.3)}})
    run = run_of(sft, dpo)
    assert [c.name for c in checkpoints(run)] == ["start", "sft", "dpo"]
    table = task_table(run)
    assert table.count("<b>") == 2
    assert "<b>40.0</b>" in table
    assert "<b>30.0</b>" in table
    # Means over both tasks: 30.0 and 30.0 tie; of the start one task is missing, so no mean is claimed.
    last = table.split("average")[1]
    assert last.count("30.0") == 2
    assert "–" in last


def test_scores_taken_otherwise_are_marked():
    run = run_of(EMPTY._replace(before=task(0.1), after=task(0.4, "b")))
    assert "40.0°" in task_table(run)
    assert "do not compare" in task_table(run)
    assert "°" not in task_table(run_of(EMPTY._replace(before=task(0.1), after=task(0.4))))


def test_scores_taken_otherwise_are_neither_the_best_nor_in_a_mean():
    sft = EMPTY._replace(
        before=task(0.1), after=task(0.2), tasks={when: {"b": task(0.3)} for when in ("before", "after")}
    )
    dpo = EMPTY._replace(name="dpo", after=task(0.9, "other"), tasks={"after": {"b": task(0.4)}})
    table = task_table(run_of(sft, dpo))
    assert "<b>20.0</b>" in table
    assert "90.0°" in table
    assert "<b>90.0" not in table
    assert "65.0" not in table  # the mean of 90 and 40
    assert "<b>25.0</b>" in table  # that of 20 and 30


def test_one_checkpoint_makes_no_table():
    assert task_table(run_of(EMPTY._replace(before=task(0.1)))) == ""


def test_the_held_out_score_is_drawn_from_start_to_end(run_dir):
    sft = read_run(run_dir).stages[0]
    (figure,) = score_curves(sft, "x")
    (trace,) = traces_of(figure)
    assert trace["x"] == [0, 10, 20, 30, 39]  # the made run counts steps from 0
    assert trace["y"] == [s.accuracy for s in (sft.before, *(s for _, s in sft.between), sft.after)]
    assert score_curves(sft._replace(between=()), "x") == [], "before and after stand in the score chart"


def test_each_task_that_was_scored_in_between_has_a_curve():
    tasks = {"before": {"a": task(0.1), "b": task(0.5)}, "step_000004": {"a": task(0.2)}, "after": {"a": task(0.4)}}
    stage = EMPTY._replace(metrics=({"step": 9.0},), tasks=tasks)
    (figure,) = score_curves(stage, "x")
    assert "Score on a" in figure
    (trace,) = traces_of(figure)
    assert (trace["x"], trace["y"]) == ([0, 4, 9], [0.1, 0.2, 0.4])


def test_validations_are_drawn_with_what_they_validate(run_dir):
    dpo = read_run(run_dir).stages[2]
    html = next(chart for chart in stage_charts(dpo, "s2")[0] if ">Margin<" in chart)
    dots, _, held = traces_of(html)
    assert held["y"] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert held["x"] == [10, 20, 30, 40, 50]
    assert held["marker"]["symbol"] == "diamond"
    assert held["line"]["color"] != dots["marker"]["color"]
    assert "on held-out rows" in html


def test_a_validation_without_a_counterpart_has_a_chart_of_its_own():
    stage = EMPTY._replace(metrics=({"step": 1.0, "loss": 1.0},), validation=({"step": 1.0, "val_score": 0.5},))
    main_ones, more = stage_charts(stage, "s")
    assert len(main_ones) == 1
    assert traces_of(more[0])[0]["y"] == [0.5]


def answers(*outcomes: str) -> tuple[Sample, ...]:
    return tuple(Sample(f"p{i}", "t", f"r{i}", outcome, 0.0) for i, outcome in enumerate(outcomes))


def test_prompts_are_chosen_so_that_every_course_of_verdicts_appears():
    always = ["wrong"] * 10
    before = answers(*always, "right", "wrong")
    after = answers(*always, "wrong", "right")
    chosen = pick_prompts([Column("start", before), Column("sft", after)], n=4)
    assert chosen == [0, 1, 10, 11], "what was lost and what was gained, and two that stayed wrong"
    assert pick_prompts([Column("start", answers(*always)), Column("sft", answers(*always))]) == [0, 1, 2]


def test_answers_stand_side_by_side_under_their_checkpoints(run_dir):
    run = read_run(run_dir)
    shown = columns(run)
    assert [column.name for column in shown] == ["start", "sft", "dpo", "ppo"]
    page = Page(samples_section(shown))
    cards = sum("sample" in (attrs.get("class") or "").split() for _, attrs in page.tags)
    answered = sum("answer" in (attrs.get("class") or "").split() for _, attrs in page.tags)
    assert 4 <= cards <= 8
    assert answered == 4 * cards
    assert f"{cards} of 300 held-out prompts" in page.text


def test_answers_to_other_prompts_are_not_put_beside(run_dir):
    path = run_dir / "dpo" / "scores" / "after.json"
    value = json.loads(path.read_text())
    value["settings"] = "other"
    path.write_text(json.dumps(value))
    assert [column.name for column in columns(read_run(run_dir))] == ["start", "sft", "ppo"]
    assert samples_section(columns(read_run(run_dir))[:1]) == ""


def test_time_is_that_of_the_phases_and_the_rest():
    steps = ({"step": 1.0, "seconds": 4.0, "seconds_generate": 1.0, "seconds_update": 2.0},) * 2
    found = phases(EMPTY._replace(metrics=steps))
    assert found == {"generate": 2.0, "update": 4.0, "rest of the step": 2.0}
    assert phases(EMPTY._replace(metrics=({"step": 1.0, "seconds": 4.0},))) == {"whole steps": 4.0}
    assert phases(EMPTY) == {}


def test_the_data_section_has_every_source_with_why_rows_were_left_out(run_dir):
    page = Page(data_part(read_run(run_dir).stages[0]))
    for figure in ("additions", "288", "12 too long", "20.5k", "all that is trained on", "41k", "abababababababab"):
        assert figure in page.text
    assert "ab" * 9 not in page.text, "a hash is cut"
    assert data_part(EMPTY) == ""


def test_what_was_set_over_the_files_is_listed_with_what_they_say(run_dir):
    changes = from_files(read_run(run_dir).stages[0])
    assert changes == [Change("seed", "0", "1"), Change("model.beta", "(not set)", "0.05")], "lr is as the file says"
    assert from_files(EMPTY) is None, "runs of older versions have not recorded it"


def test_leaves_of_a_config_have_dotted_keys():
    config = {"a": {"b": 1, "c": []}, "d": [1, 2], "e": [{"f": None}, {"f": "x"}]}
    assert dict(leaves(config)) == {"a.b": "1", "a.c": "[]", "d": "[1, 2]", "e[0].f": "null", "e[1].f": "x"}


def test_two_runs_settings_that_differ():
    one = EMPTY._replace(config=yaml.safe_dump({"trainer": {"default_root_dir": "x"}, "lr": 1e-5, "k": 1}))
    two = EMPTY._replace(config=yaml.safe_dump({"trainer": {"default_root_dir": "y"}, "lr": 2e-5, "m": 1}))
    assert between_runs(one, two) == [
        Change("k", "1", "(not set)"),
        Change("lr", "1e-05", "2e-05"),
        Change("m", "(not set)", "1"),
    ]
    assert between_runs(one, EMPTY) is None
    assert between_runs(one, EMPTY._replace(config="a: [1")) is None, "cut off while being written"


def test_the_difference_of_two_runs_is_paired_by_prompt():
    here, there = (1.0, 1.0, 0.0, 1.0), (0.0, 1.0, 0.0, 1.0)
    one = EMPTY._replace(after=task(0.75, per_item=here))
    two = EMPTY._replace(after=task(0.5, per_item=there))
    table = compared(run_of(one), run_of(two, name="q"), ("r", "q"))
    _, low, high = gain(Paired(there, here), 0.95)
    assert "+25.0 pts" in table
    assert f"{100 * low:+.1f} to {100 * high:+.1f}, paired" in table
    other = EMPTY._replace(after=task(0.5, "b", per_item=there))
    assert "other settings" in compared(run_of(one), run_of(other, name="q"), ("r", "q"))


def item(number, group, right):
    return {"key": f"t/{number}", "group": group, "target": "", "score": float(right), "answers": []}


def test_the_difference_of_a_mean_over_groups_has_an_interval_of_that_mean(tmp_path):
    """300 items of one group lose 30, 20 of another gain 8: the mean of means rises by (-0.1 + 0.4) / 2."""
    before = TaskResult(
        "t",
        1,
        "s",
        "m",
        "macro",
        "a",
        "d",
        "",
        tuple(item(i, "big" if i < 300 else "small", i < 150) for i in range(320)),
    )
    after = replace(
        before,
        items=tuple(
            {**each, "score": 0.0 if i < 30 else 1.0 if i >= 312 else each["score"]}
            for i, each in enumerate(before.items)
        ),
    )
    for name, each in (("b", before), ("a", after)):
        each.to_json(tmp_path / f"{name}.json")
    there, here = (read_scores(tmp_path / f"{name}.json", name, []) for name in ("b", "a"))
    assert here.accuracy - there.accuracy == pytest.approx(0.15)
    found, expected = paired_gain(there, here), compare_results(before, after)
    assert (found.difference, found.low, found.high) == (expected.difference, expected.low, expected.high)
    assert found.low < 0.15 < found.high


def test_stages_go_together_by_name_and_single_ones_anyhow():
    sft, dpo, ppo = (EMPTY._replace(name=name) for name in ("sft", "dpo", "ppo"))
    assert [(a.name, b.name) for a, b in matched(run_of(sft, dpo), run_of(dpo, ppo))] == [("dpo", "dpo")]
    assert [(a.name, b.name) for a, b in matched(run_of(sft), run_of(ppo))] == [("sft", "ppo")]


def test_runs_of_one_name_are_told_apart():
    one, two = run_of(EMPTY, name="a"), run_of(EMPTY, name="a")
    assert len(set(pairing(one, two).names)) == 2
    assert pairing(one, two._replace(path=Path("elsewhere"))).names == ("a", "elsewhere")


def test_two_runs_on_one_page(run_dir, tmp_path, capsys):
    other = write_run(tmp_path / "again")
    recipe = json.loads((other / "recipe.json").read_text())
    dump(other / "recipe.json", {**recipe, "name": "again"})
    scores(0.5).to_json(other / "ppo" / "scores" / "after.json")
    (other / "ppo" / "config.yaml").write_text("stage: ppo\nseed: 2\nmodel:\n  lr: 1.0e-05\n  beta: 0.05\n")
    shutil.rmtree(other / "pairs")
    dump(other / "recipe.json", {**recipe, "name": "again", "stages": ["sft", "dpo", "ppo"]})
    assert main([str(run_dir), "--against", str(other), "--out", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'both.html'}\n"
    text = (tmp_path / "both.html").read_text()
    page = Page(text.replace(plotly_js(), ""))
    assert "pairs only in smol" in page.text
    assert "+18.0 pts" in page.text  # 68% against 50%
    assert "Dotted lines are those of again." in page.text
    loss = next(part for part in text.split("<figure") if "<b>Loss</b>" in part)
    traces = traces_of(loss)
    assert [trace["name"] for trace in traces] == ["smol", "smol", "again", "again"]
    assert [trace["line"].get("dash") for trace in traces[1::2]] == [None, "dot"]
    assert page.captions.count("Outcomes") == 2, "two stacks on one pair of axes cannot be read"
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_a_stage_folder_by_itself_is_a_report(run_dir):
    page = page_of(read_run(run_dir / "dpo"))
    assert "Rewards of the pairs" in page.captions
    assert "Held-out score" in page.captions
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    ids = {attrs.get("id") for _, attrs in page.tags}
    assert all(link[1:] in ids for link in links)


def test_any_new_file_may_be_missing_or_torn_or_hold_something_else(run_dir):
    names = ("config_origin.json", "data_manifest.json", "validation.jsonl", "scores/step_000010.json")
    files = [run_dir / "dpo" / name for name in names]
    for path in files:
        path.write_text(path.read_text()[: path.stat().st_size // 2])
    run = read_run(run_dir)
    assert len(run.notes) == 4, run.notes
    assert page_of(run).captions
    for path in files:
        path.write_text('{"sources": 3, "command_line": [], "files": 1, "summary": {"accuracy": "x"}}')
    assert page_of(read_run(run_dir)).captions
    for path in files:
        path.unlink()
    assert page_of(read_run(run_dir)).captions


def test_alerts_stand_first_with_their_evidence_and_a_link_to_the_curves(run_dir):
    path = run_dir / "ppo" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "zero_signal_share": 0.95}) + "\n" for row in rows))
    page = page_of(read_run(run_dir))
    hrefs = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert hrefs[0] == "#alerts"
    assert "#curves-3" in hrefs, "ppo is the fourth stage"
    assert "curves-3" in {attrs.get("id") for _, attrs in page.tags}
    told = page.text.split("Alerts", 2)[2].split("By checkpoint")[0]
    assert "dead groups" in told
    assert "95" in told.split("Curves of ppo")[0], "the share that was seen"


def rewarded(*rewards: float) -> tuple[dict[str, float], ...]:
    return tuple({"step": float(step), "reward": reward} for step, reward in enumerate(rewards, 1))


def test_alerts_hold_the_reward_against_the_held_out_scores():
    metrics = rewarded(*([0.0, 0.1] * 10), *([5.0, 5.1] * 10))
    stage = EMPTY._replace(name="ppo", metrics=metrics, before=task(0.5), after=task(0.4))
    (found,) = find_alerts([stage], ["x"])
    assert (found.stage, found.alert.rule, found.link) == ("ppo", "reward without score", "x")
    assert find_alerts([stage._replace(after=task(0.9))], ["x"]) == []
    tasks = {"before": {"gsm8k": task(0.5)}, "after": {"gsm8k": task(0.4)}}
    assert len(find_alerts([stage._replace(before=None, after=None, tasks=tasks)], ["x"])) == 1


def test_the_page_goes_by_the_limits_of_the_run():
    metrics = tuple({"step": float(step), "mismatch_kl": 0.01} for step in range(1, 30))
    callback = {"class_path": "tulu_lightning.callbacks.alerts.Alerts", "init_args": {"limits": {"mismatch_kl": 0.005}}}
    config = yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "a.B"}, callback]}})
    stage = EMPTY._replace(metrics=metrics)
    assert find_alerts([stage], ["x"]) == []
    assert [told.alert.rule for told in find_alerts([stage._replace(config=config)], ["x"])] == ["mismatch KL"]
    for broken in ("trainer: [", "trainer:\n  callbacks: 3", config.replace("0.005", "-1")):
        assert find_alerts([stage._replace(config=broken)], ["x"]) == []


def test_links_lead_to_sections_that_are_there(run_dir):
    page = page_of(read_run(run_dir))
    links = [attrs["href"][1:] for tag, attrs in page.tags if tag == "a"]
    assert links == ["scores", "curves", "samples", "rollouts", "cost", "data", "configs", "versions"]


def test_a_stage_without_scores_shows_its_last_figure(run_dir):
    shutil.rmtree(run_dir / "dpo" / "scores")
    assert "pair accuracy on held-out rows" in page_of(read_run(run_dir)).text
