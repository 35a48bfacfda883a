"""metrics.jsonl stays JSON, and skipped updates are seen in it."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "stages"))

import lightning as L
import stage_runs as runs

from tulu_lightning.callbacks.records import Records, _append
from tulu_lightning.data.sources import Source


def strict(text):
    def refuse(name):
        pytest.fail(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_written_as_null(tmp_path):
    _append(tmp_path / "m.jsonl", [{"step": 1, "loss": float("nan"), "kl": float("-inf"), "lr": 0.5, "text": "NaN"}])
    row = strict((tmp_path / "m.jsonl").read_text())
    assert row == {"step": 1, "loss": None, "kl": None, "lr": 0.5, "text": "NaN"}


def test_a_skipped_update_is_counted_in_its_own_step(tmp_path):
    stage = runs.sft()
    weights = stage._weights
    stage._weights = lambda pack: weights(pack) * (float("nan") if stage.step == 1 else 1.0)
    runs.fit(stage, runs.sft_data(max_steps=3), tmp_path)
    rows = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_updates"] for row in rows] == [0.0, 1.0, 0.0]
    assert rows[1]["grad_norm"] is None


def test_the_reference_pass_of_dpo_shows_how_far_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TULU_REFERENCE", str(tmp_path / "reference"))  # no other test has computed it
    runs.fit(runs.dpo(), runs.preference_data(max_steps=1), tmp_path)
    out = capsys.readouterr()
    assert "reference of sums  8/8" in out.out + out.err


def test_what_validation_finds_is_recorded_before_and_within_a_fit(tmp_path):
    """A notebook's way: the baseline first, then a fit that validates, then again."""
    held_out = Source("held out", rows="tulu_lightning.assets.arithmetic.sft_rows", args={"count": 8, "seed": 7})
    stage, data = runs.sft(), runs.sft_data(max_steps=2, validation=[held_out])
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path, callbacks=[Records()], **quiet
    )
    (before,) = trainer.validate(stage, data, verbose=False)
    trainer.fit(stage, data)
    (after,) = trainer.validate(stage, data, verbose=False)
    (row,) = [strict(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert row["step"] == 2
    assert row["val_loss"] == pytest.approx(after["val_loss"])
    assert after["val_loss"] < before["val_loss"], "trained"
