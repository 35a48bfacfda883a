import io
import shutil

import pytest
from rich.console import Console

from tulu_lightning.recipes.records import read_run
from tulu_lightning.recipes.table import HEADINGS, count, duration, memory, score_rows, score_table


def printed(run_dir, width=80):
    out = io.StringIO()
    Console(file=out, width=width).print(score_table(run_dir))
    return out.getvalue()


def test_the_rows_hold_accuracy_interval_difference_and_cost(run_dir):
    ppo = dict(zip(HEADINGS, score_rows(read_run(run_dir))[3], strict=True))
    # Wilson, z² = 3.84, n = 300: centres 0.4506 and 0.6777, half widths 1.96 sqrt(p (1 - p) / n + z² / 4n²) / 1.0128 =
    # 0.0559 and 0.0525.
    assert ppo["Before"] == ("45.0%", "39.5–50.7")
    assert ppo["After"] == ("68.0%", "62.5–73.0")
    assert ppo["Difference"] == ("+23.0 pts", "+17.0 to +29.0")
    assert (ppo["Time"].text, ppo["Tokens"].text) == ("8m 32s", "123k")
    assert ppo["Peak memory"].text == "3.2 GiB"  # 3.4e9 / 2**30 = 3.17
    assert ppo["Promoted"] == ("yes", "the lower end of the paired interval is above -1 point")


def test_the_table_fits_eighty_columns_uncut(run_dir):
    text = printed(run_dir)
    assert "…" not in text
    assert "no clear loss [-2, +6]" in text, "square brackets are text, not markup"
    assert "212 pairs from 1,200 samples of 300 prompts" in text


def test_an_unfinished_run_has_a_table_too(run_dir):
    (run_dir / "ppo" / "summary.json").unlink()
    (run_dir / "ppo" / "scores" / "after.json").unlink()
    shutil.rmtree(run_dir / "dpo")
    text = printed(run_dir)
    assert "ppo: 60 steps so far" in text
    assert "dpo: not started" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (4.46, "4.5s"), (59.4, "59s"), (59.6, "1m 00s"), (512.3, "8m 32s"), (11100, "3h 05m")],
)
def test_durations(value, text):
    assert duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0, "0"), (950, "950"), (12345, "12.3k"), (999_600, "1M"), (4.56e6, "4.56M")]
)
def test_counts(value, text):
    assert count(value) == text


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (512 * 2**20, "512 MiB"), (3 * 2**29, "1.5 GiB")])
def test_memory(value, text):
    assert memory(value) == text
