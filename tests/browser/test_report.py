"""The report in a real browser: silent, self-contained, readable on a phone and in the dark, and it can be hovered."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from made_run import scores, write_run

from tulu_lightning.launch.fit import fit
from tulu_lightning.recipes.recipe import main as recipe
from tulu_lightning.recipes.report import write_report

CONFIGS = Path(__file__).parents[2] / "configs"
WIDE, PHONE = 1280, 390
LEAST_CONTRAST = 4.5
"""WCAG 2.2, level AA, for text."""

CONTRAST = """() => {
  const channel = c => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const found = numbers(getComputedStyle(node).backgroundColor);
      if (found.length < 4 || found[3] === 1) return found.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const worst = [];
  document.querySelectorAll("h1, h2, h3, p, td, th, span, pre, code, a, b, small, summary, footer, strong").forEach(node => {
    if (!node.innerText || !node.innerText.trim() || !node.getClientRects().length || node.closest("svg")) return;
    const [one, two] = [light(numbers(getComputedStyle(node).color)), light(behind(node))].sort((a, b) => b - a);
    worst.push([(one + 0.05) / (two + 0.05), node.tagName, node.className, node.innerText.slice(0, 40)]);
  });
  return worst.sort((a, b) => a[0] - b[0])[0];
}"""

OVERFLOWING = """() => [...document.querySelectorAll("main *")].filter(node => {
  const box = node.getBoundingClientRect();
  const scrolls = parent => parent && (getComputedStyle(parent).overflowX !== "visible" || scrolls(parent.parentElement));
  return !node.closest("svg") && box.width > 0 && (box.right > innerWidth + 0.5 || box.left < -0.5) && !scrolls(node.parentElement);
}).map(node => `${node.tagName}.${node.className}`).slice(0, 5)"""

CUT = """() => [...document.querySelectorAll("td, th, h1, h2, h3, p, summary, .key, .answer, .facts")].filter(node =>
  node.scrollWidth > node.clientWidth + 1 && node.clientWidth > 0 && getComputedStyle(node).display !== "inline"
).map(node => node.outerHTML.slice(0, 120)).slice(0, 5)"""


@pytest.fixture(scope="session")
def real(chromium, tmp_path_factory) -> Path:
    """The shipped tiny recipe, with held-out scores before, after and in between, run here."""
    folder = tmp_path_factory.mktemp("real")
    here = "tulu_lightning."
    held_out = {"name": "held-out", "rows": f"{here}assets.arithmetic.heldout_rows", "args": {"count": 24}}
    for stage in ("sft", "dpo", "ppo"):
        names = ["throughput.Throughput", "records.Records", "checkpoints.Checkpoints"]
        names[2:2] = ["refresh.RolloutRefresh"] if stage == "ppo" else []
        callbacks: list[dict] = [{"class_path": f"{here}callbacks.{name}"} for name in names]
        callbacks[-1]["init_args"] = {"every_n_steps": 100, "keep": 1}
        evaluate = {"max_new_tokens": 8, "every_n_steps": 2, "sources": [held_out]}
        callbacks.append({"class_path": f"{here}callbacks.evaluate.Evaluate", "init_args": evaluate})
        callbacks.append({"class_path": f"{here}callbacks.promote.Promote"})
        leaf: dict = {"include": [str(CONFIGS / f"{stage}_tiny.yaml")], "trainer": {"callbacks": callbacks}}
        if stage == "dpo":
            rows = {
                "name": "held pairs",
                "rows": f"{here}assets.arithmetic.pair_rows",
                "args": {"count": 16, "seed": 5},
            }
            leaf["data"] = {"init_args": {"validation": [rows]}}
            leaf["trainer"]["val_check_interval"] = 2
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(leaf))
    stages = [{"name": stage, "fit": f"{stage}.yaml"} for stage in ("sft", "dpo", "ppo")]
    plan = {"name": "tiny", "run": str(folder / "run"), "on_reject": "continue", "stages": stages}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(plan))
    assert recipe(["--config", str(folder / "recipe.yaml")]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A run of sixty steps with awkward texts, without training."""
    return write_run(tmp_path_factory.mktemp("made") / "smol")


def check(page, heard, where: Path) -> None:
    """What holds of every report, at any width."""
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length > 0")
    assert heard.console == []
    assert heard.requests == [where.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate(CUT) == []
    contrast, *whose = page.evaluate(CONTRAST)
    assert contrast >= LEAST_CONTRAST, whose
    sizes = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(n => n.innerText && n.getClientRects().length && "
        "!n.closest('svg')).map(n => parseFloat(getComputedStyle(n).fontSize))"
    )
    assert min(sizes) >= 12


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_a_real_recipe(real, visit, width, scheme):
    page, heard = visit(real / "report.html", width, scheme)
    check(page, heard, real / "report.html")
    assert page.locator("h3", has_text="By checkpoint").count() == 1
    assert page.locator(".sample .answer").count() >= 4
    assert page.locator("#data").count() == 1
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark == ("rgb(15, 17, 21)" if scheme == "dark" else "rgb(246, 247, 249)")


@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_awkward_texts_run_nothing_and_fetch_nothing(made, tmp_path, visit, width):
    where = write_report(made, tmp_path / "page.html")
    page, heard = visit(where, width)
    check(page, heard, where)
    assert "alert(" in page.locator("#data ~ div").first.inner_text(), "and are shown as they were written"


def test_a_curve_tells_its_value_where_the_pointer_is(made, tmp_path, visit):
    page, _ = visit(write_report(made, tmp_path / "page.html"))
    plot = page.locator("figure", has_text="what the optimiser minimises").first.locator(".js-plotly-plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    label = plot.locator(".hoverlayer")
    label.locator("text").first.wait_for()
    words = label.text_content()
    assert "step" in words
    rows = [json.loads(line) for line in (made / "sft" / "metrics.jsonl").read_text().splitlines()]
    told = {f"step {row['step']}{row['loss']:.4g}" for row in rows}
    assert any(words.startswith(one.rstrip("0")) for one in told), words


def test_what_is_folded_opens_to_the_width_of_the_page(made, tmp_path, visit):
    page, heard = visit(write_report(made, tmp_path / "page.html"), PHONE)
    box = page.locator("details.more").first
    box.locator("summary").click()
    plot = box.locator(".js-plotly-plot").first
    plot.wait_for()
    page.wait_for_timeout(500)
    drawn = plot.locator(".main-svg").first.bounding_box()
    assert 250 < drawn["width"] <= PHONE
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
    assert heard.console == []


def test_the_links_lead_to_their_sections(made, tmp_path, visit):
    page, _ = visit(write_report(made, tmp_path / "page.html"), PHONE)
    for link in page.locator("nav a").all():
        assert page.locator(f"h2{link.get_attribute('href')}").is_visible()


@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_two_runs_on_one_page(made, tmp_path, visit, width):
    other = tmp_path / "a-second-run-with-a-rather-long-name"
    shutil.copytree(made, other)
    record = json.loads((other / "recipe.json").read_text())
    (other / "recipe.json").write_text(json.dumps({**record, "name": other.name}))
    scores(0.5).to_json(other / "ppo" / "scores" / "after.json")
    (other / "ppo" / "config.yaml").write_text("stage: ppo\nmodel:\n  lr: 2.0e-05\n")
    where = write_report(made, tmp_path / "page.html", other)
    page, heard = visit(where, width)
    check(page, heard, where)
    assert "+18.0 pts" in page.locator("#compared ~ .card").first.inner_text()


@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_a_run_that_was_killed_midway(made, tmp_path, visit, width):
    run = tmp_path / "killed"
    shutil.copytree(made, run)
    shutil.rmtree(run / "ppo")
    for name in ("summary.json", "scores/after.json"):
        (run / "dpo" / name).unlink()
    for name in ("metrics.jsonl", "validation.jsonl", "config_origin.json"):
        path = run / "dpo" / name
        path.write_text(path.read_text()[: path.stat().st_size * 2 // 3])
    where = write_report(run)
    page, heard = visit(where, width)
    check(page, heard, where)
    text = page.locator("main").inner_text()
    assert "steps so far" in text
    assert "not started" in text
    assert "torn line" in text


@pytest.mark.parametrize("stage", ["reward", "grpo"])
def test_a_stage_that_was_run_by_itself(tmp_path, visit, stage):
    fit(CONFIGS / f"{stage}_tiny.yaml", [f"--trainer.default_root_dir={tmp_path / stage}"])
    where = write_report(tmp_path / stage)
    page, heard = visit(where, PHONE)
    check(page, heard, where)
    assert page.locator("figcaption", has_text="Loss").count() >= 1


def test_a_stage_folder_of_a_recipe(real, tmp_path, visit):
    where = write_report(real / "dpo", tmp_path / "page.html")
    page, heard = visit(where)
    check(page, heard, where)
    assert page.get_by_text("on held-out rows").count() >= 1
