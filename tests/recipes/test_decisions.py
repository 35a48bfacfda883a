"""Runs that were scored by tasks of a suite: what the report and the table show of scores, decisions and answers."""

import json
from dataclasses import replace

import pytest
from pages import Page

from tulu_lightning.checkpoints.promoted import record_path, write_record
from tulu_lightning.evaluation.result import TaskResult
from tulu_lightning.recipes.decision_records import read_decisions, standing
from tulu_lightning.recipes.records import read_run
from tulu_lightning.recipes.report import render
from tulu_lightning.recipes.report_charts import plotly_js
from tulu_lightning.recipes.report_samples import columns, sampled_tasks
from tulu_lightning.recipes.table import score_rows


def result(task, right, n=120, prompt="Who is <b>there</b>?"):
    """The first `right` of n items right."""
    answer = {"tokens": 3, "finish": "stop"}
    items = tuple(
        {
            "key": f"{task}/{i}", "group": "", "target": "x", "score": float(i < right), "prompt": f"{prompt} {i}",
            "answers": [{**answer, "text": f"<i>{i < right}</i>", "outcome": "right" if i < right else "wrong", "score": float(i < right)}],
        }
        for i in range(n)
    )  # fmt: skip
    return TaskResult(task, 1, "s", "m", "micro", "model", "d", "", items)


def verdict(task, role, difference, confidence=0.975):
    said = {"difference": difference, "low": difference - 0.05, "high": difference + 0.05, "confidence": confidence}
    return {"task": task, "role": role, "bound": 0.0, "n": 120, **said, "passed": True, "reason": f"{task} {role}"}


def seal(run, step, moment, promote, *verdicts, look=1, looks=2):
    first = verdicts[0]
    told = {name: first[name] for name in ("difference", "low", "high")}
    decision = {"promote": promote, "reason": f"because of {first['task']}", **told, "verdicts": verdicts}
    write_record(
        record_path(run, step), {"step": step, "moment": moment, "decision": {**decision, "look": look, "looks": looks}}
    )


@pytest.fixture
def killed(tmp_path):
    """A stage that promoted at step 10 and was killed at step 20, after another decision."""
    run = tmp_path / "sft"
    for moment, coin, ifeval in (("before", 40, 30), ("step_000010", 70, 29), ("step_000020", 69, 28)):
        result("coin", coin).to_json(run / "scores" / moment / "coin.json")
        result("ifeval", ifeval).to_json(run / "scores" / moment / "ifeval.json")
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in range(1, 21)))
    seal(run, 10, "step_000010", True, verdict("coin", "gain", 0.25), verdict("ifeval", "guard", -0.01))
    seal(run, 20, "step_000020", False, verdict("coin", "gain", -0.0083, 0.6), look=2)
    return run


def test_all_sealed_decisions_are_read_and_the_last_that_promoted_stands(killed):
    notes = []
    first, second = read_decisions(killed, "sft", notes)
    assert (first.step, first.promote, first.task, first.confidence) == (10, True, "coin", 0.975)
    assert (second.step, second.promote, second.confidence, second.look) == (20, False, 0.6, 2)
    assert second.verdicts[0].against == "step_000010", "a gain is held against what was promoted last"
    assert first.verdicts[1].against == "before"
    assert standing((first, second)) is first
    assert notes == []


def test_a_record_that_was_changed_is_left_out_with_a_note(killed):
    path = record_path(killed, 20)
    path.chmod(0o644)
    path.write_text(path.read_text().replace("because", "Because"))
    notes = []
    assert [each.step for each in read_decisions(killed, "sft", notes)] == [10]
    assert "was changed after it was written" in notes[0]


def test_a_run_that_was_killed_after_a_promotion_shows_it_with_its_own_task_and_confidence(killed):
    (row,) = score_rows(read_run(killed))
    texts = [f"{cell.text} {cell.detail}" for cell in row]
    assert texts[1].startswith("33.3%"), "40 of 120 coins before"
    assert "+25.0 pts" in texts[3]
    assert "97.5%" in texts[3]
    assert texts[-1].startswith("yes")
    page = Page(render(read_run(killed)).replace(plotly_js(), ""))
    assert "promoted" in page.text
    assert "look 2 of 2: coin gain" in page.text
    assert "60%" in page.text
    assert "over step 10" in page.text


def test_answers_to_tasks_stand_side_by_side_by_stage_and_are_escaped(killed):
    result("coin", 80).to_json(killed / "scores" / "after" / "coin.json")
    run = read_run(killed)
    assert sampled_tasks(run)[0] == "coin"
    assert [column.name for column in columns(run, task="coin")] == ["start", "sft"]
    html = render(run).replace(plotly_js(), "")
    assert "<i>True</i>" not in html
    page = Page(html)
    assert "of 120 items of coin" in page.text
    assert "Who is <b>there</b>?" in page.text


def test_ranked_choices_and_older_results_have_no_samples(killed):
    ranked = result("mmlu", 3)
    logps = tuple(
        {**item, "answers": [{**item["answers"][0], "tokens": 0, "text": "[-1, -2]"}]} for item in ranked.items
    )
    older = tuple({k: v for k, v in item.items() if k != "prompt"} for item in ranked.items)
    for name, items in (("mmlu", logps), ("old", older)):
        for moment in ("before", "after"):
            replace(ranked, task=name, items=items).to_json(killed / "scores" / moment / f"{name}.json")
    assert not {"mmlu", "old"} & set(sampled_tasks(read_run(killed)))


def test_a_stage_that_went_on_after_its_end_was_promoted_has_a_page(killed):
    seal(killed, 30, "after", True, verdict("coin", "gain", 0.1))
    seal(killed, 40, "step_000040", False, verdict("coin", "gain", 0.02))
    page = Page(render(read_run(killed)).replace(plotly_js(), ""))
    assert "over the former end" in page.text
