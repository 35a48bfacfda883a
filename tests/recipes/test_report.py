import json
import shutil

import pytest
from pages import Page, traces_of

from tulu_lightning.errors import InputError
from tulu_lightning.recipes.records import Rollout, StageRecord, read_run
from tulu_lightning.recipes.report import main, render, write_report
from tulu_lightning.recipes.report_charts import CHARTS, plotly_js, stage_charts
from tulu_lightning.recipes.report_curves import MAX_POINTS, smooth
from tulu_lightning.recipes.report_rollouts import pick_rollouts

PAIR_CHARTS = [
    "Margin",
    "Pair accuracy",
    "Pair accuracy by source",
    "Rewards of the pairs",
    "Lengths of the pairs",
    "Log-probs of the answers",
    "KL on the pairs",
]


def page_of(run_dir) -> Page:
    # Reading five megabytes of plotly takes a second each time: it has a test of its own.
    return Page(render(read_run(run_dir)).replace(plotly_js(), ""))


def charts_of(page: Page) -> list[str]:
    return page.captions


def test_the_page_asks_nothing_of_the_network(run_dir):
    page = page_of(run_dir)
    assert page.links(), "the section links at least"
    assert all(link.startswith("#") for link in page.links())
    assert not {"link", "iframe", "img", "object", "base"} & {tag for tag, _ in page.tags}
    styles = render(read_run(run_dir)).split("<style>")[1].split("</style>")[0]
    assert "url(" not in styles
    assert "@import" not in styles
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_plotly_is_inlined_once(run_dir):
    assert "</script" not in plotly_js(), "it would end the element that holds it"
    assert render(read_run(run_dir)).count(f"<script>{plotly_js()}</script>") == 1


def test_every_required_curve_is_there(run_dir):
    charts = charts_of(page_of(run_dir))
    assert charts.count("Loss") == 3  # sft, dpo, ppo
    required = ["Reward", "KL to the reference", "Response length", "Entropy", "Clip share", "Explained variance"]
    for title in [*required, "Loss by source", "Seconds by phase", *PAIR_CHARTS]:
        assert charts.count(title) == 1, title
    assert charts.count("Held-out score by response length") == 3
    assert charts.count("critic_grad_norm") == 1, "a metric that no chart claims has a chart of its own"


def test_a_curve_draws_the_recorded_values_and_its_trend(run_dir):
    run = read_run(run_dir)
    ppo = run.stages[3]
    html = next(chart for chart in stage_charts(ppo, "s3")[0] if "KL to the reference" in chart)
    dots, line = traces_of(html)
    assert dots["y"] == [row["kl"] for row in ppo.metrics]
    assert dots["x"] == list(range(60))
    assert dots["marker"]["opacity"] < 0.5 < line["line"]["width"]
    assert line["y"] == smooth(dots["y"])


def test_an_axis_has_no_half_steps_and_no_share_beyond_all_or_none():
    metrics = tuple({"step": float(step), "score": 0.0, "reward": -1.0} for step in range(4))
    reward, score = stage_charts(StageRecord("ppo", None, metrics, None, None, None, None), "s0")[0]
    assert '"dtick":1' in reward
    assert '"autorangeoptions":{"clipmin":-0.03,"clipmax":1.03}' in score
    assert "autorangeoptions" not in reward, "a reward may be anything"


def test_both_sides_of_the_pairs_are_drawn_in_two_colours(run_dir):
    dpo = read_run(run_dir).stages[2]
    html = next(chart for chart in stage_charts(dpo, "s2")[0] if "Lengths of the pairs" in chart)
    chosen, _, rejected, _ = traces_of(html)
    assert chosen["y"] == [row["length_chosen"] for row in dpo.metrics]
    assert rejected["y"] == [row["length_rejected"] for row in dpo.metrics]
    assert (chosen["name"], rejected["name"]) == ("chosen", "rejected")
    assert chosen["marker"]["color"] != rejected["marker"]["color"]


def test_a_dpo_run_of_an_older_version_has_the_charts_of_what_it_recorded(run_dir):
    path = run_dir / "dpo" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    new = ("logp_", "kl_", "accuracy/", "pairs")
    path.write_text("".join(json.dumps({k: v for k, v in r.items() if not k.startswith(new)}) + "\n" for r in rows))
    dpo = Page("".join(stage_charts(read_run(run_dir).stages[2], "s2")[0]))
    assert charts_of(dpo) == ["Loss", "Margin", "Pair accuracy", "Rewards of the pairs", "Lengths of the pairs"]


def captions(*metrics: dict[str, float]) -> list[str]:
    stage = StageRecord("dpo", None, metrics, None, None, None, None)
    return [caption for part in stage_charts(stage, "s0") for caption in charts_of(Page("".join(part)))]


def test_a_single_source_that_says_what_the_whole_says_is_not_drawn_twice():
    same = {"step": 0.0, "accuracy": 0.5, "accuracy/sums": 0.5}
    assert captions(same) == ["Pair accuracy"]
    assert captions(same, {"step": 1.0, "accuracy": 0.5, "accuracy/sums": 0.6})[1:] == ["Pair accuracy by source"]
    assert captions({**same, "accuracy/chat": 0.5})[1:] == ["Pair accuracy by source"]


def test_what_else_is_recorded_by_source_shares_a_chart():
    step = {"step": 0.0, "kl_chosen": 0.1, "kl_chosen/sums": 0.2, "kl_chosen/a/b": 0.0, "kl_rejected/sums": 0.3}
    assert captions(step) == ["KL on the pairs", "kl_chosen by source", "kl_rejected by source"]
    alone = {"step": 0.0, "kl_chosen": 0.1, "kl_chosen/sums": 0.1}
    assert captions(alone) == ["KL on the pairs"]


def test_the_trend_of_a_straight_line_is_the_line():
    assert smooth([2.0 + 3.0 * i for i in range(20)]) == pytest.approx([2.0 + 3.0 * i for i in range(20)])


def test_the_trend_of_a_constant_is_exactly_the_constant():
    assert smooth([2048.1] * 40) == [2048.1] * 40


def test_the_trend_of_a_zigzag_is_nearly_flat():
    line = smooth([(-1.0) ** i for i in range(100)])
    assert max(map(abs, line[20:80])) < 0.05


def test_a_short_series_has_a_trend():
    assert smooth([]) == []
    assert smooth([5.0]) == [5.0]
    assert smooth([1.0, 2.0]) == pytest.approx([1.0, 2.0])


def test_a_long_run_is_thinned():
    metrics = tuple({"step": float(i), "loss": 1.0} for i in range(3 * MAX_POINTS))
    stage = StageRecord("sft", None, metrics, None, None, None, None)
    html = stage_charts(stage, "s0")[0][0]
    assert [len(trace["y"]) for trace in traces_of(html)] == [MAX_POINTS, MAX_POINTS]


def test_every_text_is_escaped(run_dir):
    from_file = '</script><b id="bad">x</b>'
    path = run_dir / "sft" / "metrics.jsonl"
    path.write_text(json.dumps({"step": 0, "loss": 1.0, f"loss/{from_file}": 2.0, from_file: 3.0}) + "\n")
    (run_dir / "sft" / "config.yaml").write_text(f"name: {from_file}\n")
    recipe = json.loads((run_dir / "recipe.json").read_text())
    recipe |= {"name": from_file, "command": from_file, "created": from_file, "versions": {from_file: from_file}}
    (run_dir / "recipe.json").write_text(json.dumps(recipe))
    summary = json.loads((run_dir / "ppo" / "summary.json").read_text())
    summary["decision"]["reason"] = summary["start"] = from_file
    (run_dir / "ppo" / "summary.json").write_text(json.dumps(summary))
    (run_dir / from_file.replace("/", "")).mkdir()
    (run_dir / from_file.replace("/", "") / "config.yaml").write_text("x: 1\n")

    page = page_of(run_dir)
    assert not any(attrs.get("id") == "bad" for _, attrs in page.tags)
    assert not any(tag == "img" for tag, _ in page.tags)
    assert not any('alert("x")' in script for script in page.scripts)
    assert page.text.count(from_file) >= 6
    assert 'alert("x")' in page.text, "and shown as it was written"


def test_a_lone_surrogate_does_not_stop_the_page(run_dir):
    (run_dir / "sft" / "metrics.jsonl").write_text('{"step": 0, "loss/\\ud800": 1.0}\n')
    assert write_report(run_dir).read_text(encoding="utf-8").endswith("</html>\n")


def test_a_run_killed_in_ppo_renders(run_dir):
    for name in ("summary.json", "scores/after.json", "rollouts.jsonl"):
        (run_dir / "ppo" / name).unlink()
    path = run_dir / "ppo" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:7])[:-20])
    page = page_of(run_dir)
    assert "6 steps so far" in page.text
    assert "1 torn line was left out" in page.text
    assert "No rollout has been recorded." in page.text
    assert "Clip share" in charts_of(page)


def test_a_run_killed_before_its_first_step_renders(run_dir):
    for name in ("pairs", "dpo", "ppo"):
        shutil.rmtree(run_dir / name)
    shutil.rmtree(run_dir / "sft" / "scores")
    (run_dir / "sft" / "summary.json").unlink()
    (run_dir / "sft" / "metrics.jsonl").write_text("")
    page = page_of(run_dir)
    assert page.text.count("not started") >= 3
    assert "No step has been recorded." in page.text
    assert charts_of(page) == []


def test_a_run_with_nothing_but_its_plan_renders(tmp_path):
    (tmp_path / "recipe.json").write_text("{}")
    assert "None has been recorded." in page_of(tmp_path).text


@pytest.mark.parametrize("name", ["recipe.json", "sft/summary.json", "dpo/scores/before.json", "pairs/config.yaml"])
def test_any_file_may_be_missing_or_torn(run_dir, name):
    path = run_dir / name
    path.write_text(path.read_text()[: path.stat().st_size // 2])
    assert charts_of(page_of(run_dir))
    path.unlink()
    assert charts_of(page_of(run_dir))


def test_ten_rollouts_spread_over_the_run_half_of_them_right(run_dir):
    chosen = pick_rollouts(read_run(run_dir).rollouts)
    assert len(chosen) == 10
    assert [r.step for r in chosen] == [0, 0, 15, 15, 29, 29, 44, 44, 59, 59]
    assert sum(r.outcome == "right" for r in chosen) == 5
    assert sum("rollout" in (attrs.get("class") or "").split() for _, attrs in page_of(run_dir).tags) == 10


def test_rollouts_of_several_stages_are_shown_apart(run_dir):
    shutil.copy(run_dir / "ppo" / "rollouts.jsonl", run_dir / "dpo" / "rollouts.jsonl")
    page = page_of(run_dir)
    assert sum("rollout" in (attrs.get("class") or "").split() for _, attrs in page.tags) == 20
    section = page.text.split("Sample rollouts")[1]
    assert section.index("dpo") < section.index("ppo")


def test_where_none_is_right_the_wrong_ones_fill_up():
    wrong = [Rollout(i, "p", "r", "wrong", 0.0, 0.0, 0.0, 1, "stop") for i in range(30)]
    chosen = pick_rollouts(wrong)
    assert len(set(chosen)) == 10
    assert (chosen[0].step, chosen[-1].step) == (0, 29)


def test_the_figures_of_the_score_table_are_on_the_page(run_dir):
    text = page_of(run_dir).text
    for figure in ("45.0%", "39.5–50.7", "+23.0 pts", "+17.0 to +29.0", "8m 32s", "123k", "3.2 GiB", "2.13.0+cpu"):
        assert figure in text


def test_chart_labels_and_colours_match_their_keys():
    for chart in CHARTS:
        assert len(chart.labels) in {0, len(chart.keys)}
        assert len(chart.colours) >= len(chart.keys)


def test_the_command_writes_the_page_and_prints_its_path(run_dir, tmp_path, capsys):
    assert main([str(run_dir), "--output", str(tmp_path / "new" / "page.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'page.html'}\n"
    assert main([str(run_dir)]) == 0
    assert (run_dir / "report.html").read_bytes() == (tmp_path / "new" / "page.html").read_bytes()
    assert not list(tmp_path.rglob("*.part"))


def test_an_output_that_cannot_be_written_is_refused(run_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(run_dir, tmp_path / "file" / "report.html")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(run_dir, run_dir)
    assert not list(tmp_path.rglob("*.part"))


def test_without_plotly_the_message_says_what_to_install(run_dir, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"plotly is not installed.*demo"):
        write_report(run_dir)
