"""The report's part on response length."""

import json

import pytest
from pages import Page, traces_of

from tulu_lightning.core.stats import wilson
from tulu_lightning.evaluation.by_length import Answer
from tulu_lightning.recipes.pair_lengths import PairLengths
from tulu_lightning.recipes.records import Scores, StageRecord, read_run
from tulu_lightning.recipes.report import render
from tulu_lightning.recipes.report_lengths import length_chart, length_facts, length_section

NOTHING = StageRecord("dpo", None, (), None, None, None, None)


def scored(*answers: tuple[int, float], settings: str = "same") -> Scores:
    mean = sum(tokens for tokens, _ in answers) / len(answers)
    held = tuple(Answer(tokens, score, tokens == 9) for tokens, score in answers)
    return Scores(0.5, 0.0, 1.0, len(answers), mean, settings, held)


BEFORE, AFTER = scored((3, 1.0), (3, 0.0), (4, 0.0), (3, 1.0)), scored((3, 1.0), (9, 0.0), (4, 1.0), (9, 1.0))


def test_points_are_scores_by_length_with_intervals_over_bars_of_counts():
    stage = NOTHING._replace(before=BEFORE, after=AFTER)
    before, bars_before, after, bars_after = traces_of(length_chart(stage, "x"))
    assert before["y"] == pytest.approx([2 / 3, 0.0])  # lengths 3 and 4; none of 9
    assert after["y"] == pytest.approx([1.0, 1.0, 0.5])
    assert (bars_before["y"], bars_after["y"]) == ([3, 1, 0], [1, 1, 2])
    low, high = wilson(1, 2)
    assert after["error_y"]["array"][2] == pytest.approx(high - 0.5)
    assert after["error_y"]["arrayminus"][2] == pytest.approx(0.5 - low)
    assert before["x"] == bars_before["x"][:2], "a point stands over its bar"
    assert all(0 < b - a < 0.5 for a, b in zip(bars_before["x"], bars_after["x"], strict=True)), "side by side"


def test_the_axis_names_the_lengths_of_each_bucket():
    many = scored(*((tokens, 1.0) for tokens in range(1, 13)))
    axis = length_chart(NOTHING._replace(after=many), "x")
    assert json.dumps(["1–2", "3–4", "5–6", "7–8", "9–10", "11–12"], separators=(",", ":")) in axis


def test_a_stage_that_was_stopped_shows_the_answers_of_its_start():
    traces = traces_of(length_chart(NOTHING._replace(before=BEFORE), "x"))
    assert {trace["name"] for trace in traces} == {"before"}


def test_a_stage_without_lengths_shows_nothing():
    assert length_section(NOTHING, "x") == ""
    assert length_section(NOTHING._replace(after=AFTER._replace(answers=(), mean_tokens=None)), "x") == ""


def test_the_table_says_whether_answers_became_longer():
    facts = length_facts(NOTHING._replace(before=BEFORE, after=AFTER))
    # Means 13 / 4 and 25 / 4; the paired differences are 0, 6, 0 and 6.
    assert facts["Held-out answers"].startswith("mean tokens 3.2 before, 6.2 after: +3.0, 95% interval ")
    assert facts["Cut at the limit"] == "0 of 4 before, 2 of 4 after"


def test_without_pairing_no_difference_is_claimed():
    other = AFTER._replace(settings_hash="other")
    facts = length_facts(NOTHING._replace(before=BEFORE, after=other))
    assert facts["Held-out answers"] == "mean tokens 3.2 before, 6.2 after"
    old = AFTER._replace(answers=())
    facts = length_facts(NOTHING._replace(before=BEFORE, after=old))
    assert facts == {"Held-out answers": "mean tokens 3.2 before, 6.2 after"}
    shorter = AFTER._replace(answers=AFTER.answers[:3])
    assert length_facts(NOTHING._replace(before=BEFORE, after=shorter))["Held-out answers"].endswith("after")


def test_the_table_has_the_mean_lengths_of_all_pairs_trained_on():
    steps = (
        {"step": 0.0, "length_chosen": 4.0, "length_rejected": 8.0, "pairs": 30.0},
        {"step": 1.0, "length_chosen": 8.0, "length_rejected": 2.0, "pairs": 10.0},
    )
    # (30 × 4 + 10 × 8) / 40 and (30 × 8 + 10 × 2) / 40
    facts = length_facts(NOTHING._replace(metrics=steps))
    assert facts["Pairs trained on"] == "mean tokens 5.0 chosen, 6.5 rejected"
    old = tuple({key: value for key, value in step.items() if key != "pairs"} for step in steps)
    facts = length_facts(NOTHING._replace(metrics=old))
    assert facts["Pairs trained on"] == "mean tokens 6.0 chosen, 5.0 rejected", "steps count alike"


def test_the_table_of_the_pairs_stage_says_which_side_is_longer():
    facts = length_facts(NOTHING._replace(pair_lengths=PairLengths(8, 3.25, 5.5, 0.125, 0.5)))
    assert facts["Mean tokens"] == "3.2 chosen, 5.5 rejected"
    assert facts["Longer side"] == "chosen in 12% of the pairs, rejected in 50%, neither in 38%"


def test_the_page_has_a_section_for_the_pairs_and_one_for_each_scored_stage(run_dir):
    run = read_run(run_dir)
    page = Page("".join(length_section(stage, f"s{i}-length") for i, stage in enumerate(run.stages)))
    assert page.captions == ["Held-out score by response length"] * 3
    assert page.text.count("Longer side") == 1
    text = render(run)
    assert all(f'id="plot-s{i}-length"' in text for i in (0, 2, 3))
    assert ">pairs <small>finished</small></h3>" in text


def test_scores_of_a_version_that_kept_no_items_still_make_a_page(run_dir):
    for when in ("before", "after"):
        path = run_dir / "dpo" / "scores" / f"{when}.json"
        value = json.loads(path.read_text())
        del value["items"]
        path.write_text(json.dumps(value))
    run = read_run(run_dir)
    assert run.notes == ()
    assert length_chart(run.stages[2], "x") == ""
    assert 'id="plot-s2-length"' not in render(run)
