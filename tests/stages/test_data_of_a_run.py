"""What a run keeps of its data: a manifest, a digest that a resume must meet unless told otherwise, held-out rows."""

import json
import logging

import lightning as L
import pytest
import stage_runs as runs
import torch
from stage_faults import Interrupt

from tulu_lightning import cli
from tulu_lightning.assets.arithmetic import pair_rows, sft_rows
from tulu_lightning.callbacks.checkpoints import checkpoint_path
from tulu_lightning.core.packing import pack
from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError

STOP = 1


@pytest.fixture
def sums(tmp_path_factory):
    """`sums(rows)` writes rows to the same file each time and returns its source."""
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"

    def write(rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [Source("sums", path=str(path))]

    return write


@pytest.fixture
def stopped(tmp_path, sums):
    """The folder of an SFT run over 24 rows, 8 a step, that was stopped after its first step."""
    runs.fit(runs.sft(), runs.sft_data(sources=sums(sft_rows(24))), tmp_path, callbacks=[Interrupt(STOP)])
    return tmp_path


def test_a_fit_leaves_its_manifest(stopped, sums):
    written = json.loads((stopped / "data_manifest.json").read_text())
    assert written == runs.sft_data(sources=sums(sft_rows(24))).manifest()
    assert written["totals"]["used"] == 24


def test_changed_rows_are_refused_and_the_message_says_how_to_accept_them(stopped, sums):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    data = runs.sft_data(sources=sums(sft_rows(24, seed=5)))
    said = r"data rows was .*… and is .*…\. .*To go on with the changed rows, set data\.init_args\.accept_changed_data to true"
    with pytest.raises(InputError, match=said):
        runs.fit(runs.sft(), data, stopped, ckpt_path=checkpoint_path(stopped, STOP))
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_changed_rows_can_be_accepted_and_are_those_that_are_trained(stopped, sums, caplog):
    """More rows, too: the run has as many steps as they give."""
    rows = sums(sft_rows(40, seed=5))
    data = runs.sft_data(sources=rows, accept_changed_data=True)
    with caplog.at_level(logging.INFO):
        watch = runs.fit(runs.sft(), data, stopped, ckpt_path=checkpoint_path(stopped, STOP))
    noted = [line for line in caplog.messages if "going on with accepted changes" in line]
    assert noted
    assert all("data rows was" in line and "total steps was 3 and is 5" in line for line in noted)
    assert len(watch.history) == 5 - STOP
    assert watch.rows[0] == data._plan(1).examples(STOP)
    assert json.loads((stopped / "data_manifest.json").read_text())["digest"] == data.digest()
    # The new rows are what the run is now: they go on without the setting, and the old ones do not.
    go_on = {"ckpt_path": checkpoint_path(stopped, 5)}
    runs.fit(runs.sft(), runs.sft_data(sources=rows), stopped, **go_on)
    with pytest.raises(InputError, match="data rows was"):
        runs.fit(runs.sft(), runs.sft_data(sources=sums(sft_rows(24))), stopped, **go_on)


def test_accepting_changed_rows_accepts_nothing_else(stopped, sums):
    path = checkpoint_path(stopped, STOP)
    data = runs.sft_data(sources=sums(sft_rows(24, seed=5)), accept_changed_data=True)
    with pytest.raises(InputError, match=r"other settings: optimizer\.lr was 0\.001 and is 0\.1\. ") as caught:
        runs.fit(runs.sft(lr=0.1), data, stopped, ckpt_path=path)
    assert "accept_changed_data" not in str(caught.value)
    # With the rows as they were, another number of steps is another run.
    data = runs.sft_data(sources=sums(sft_rows(24)), accept_changed_data=True, epochs=2)
    with pytest.raises(InputError, match="total steps was 3 and is 6"):
        runs.fit(runs.sft(), data, stopped, ckpt_path=path)


def test_a_run_that_keeps_numbers_about_its_rows_cannot_change_them(tmp_path, sums):
    runs.fit(runs.dpo(), runs.preference_data(sources=sums(pair_rows(24))), tmp_path, callbacks=[Interrupt(STOP)])
    identity = (tmp_path / "identity.json").read_text()
    data = runs.preference_data(sources=sums(pair_rows(24, seed=5)), accept_changed_data=True)
    with pytest.raises(InputError, match=r"data\.accept_changed_data: is true, and DPO keeps numbers about each row"):
        runs.fit(runs.dpo(), data, tmp_path, ckpt_path=checkpoint_path(tmp_path, STOP))
    assert (tmp_path / "identity.json").read_text() == identity


# Held-out rows ------------------------------------------------------------------------------------------------------


def held_out(count: int = 11) -> list[Source]:
    return [Source("held out", rows=runs.ROWS + "sft_rows", args={"count": count, "seed": 7})]


def test_validation_rows_come_once_each_and_are_not_trained(sums):
    data = runs.sft_data(sources=sums(sft_rows(24)), validation=held_out(), examples_per_step=4, micro_tokens=128)
    plain = runs.sft_data(sources=sums(sft_rows(24)))
    batches = list(data.val_dataloader())
    assert sorted(row for batch in batches for pack in batch.packs for row in pack.rows) == list(range(11))
    assert [len(batch.rows) for batch in batches] == [4, 4, 3]
    assert data.digest() == plain.digest()
    manifest = data.manifest()
    assert manifest.pop("validation")["sources"]["held out"]["used"] == 11
    assert manifest == plain.manifest()
    assert not any(
        torch.equal(a.segments[0].ids_L, b.segments[0].ids_L) for a in data.documents for b in data.validation_documents
    )


def test_a_fit_logs_the_loss_of_validation_rows(tmp_path, sums):
    data = runs.sft_data(sources=sums(sft_rows(16)), validation=held_out(5))
    stage = runs.sft()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(stage, data)
    rows = pack(list(data.validation_documents))
    with torch.no_grad():
        expected = float(-(rows.weight_N * stage.model(rows).logp_N).sum() / rows.weight_N.sum())
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(expected, rel=1e-5)


def test_validation_rows_that_the_model_cannot_read_are_refused(tmp_path, sums):
    rows = sums([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 5000}]}])
    data = runs.sft_data(validation=rows, max_tokens=6000)
    with pytest.raises(InputError, match=r"the longest row has 50\d\d tokens, and the model"):
        runs.fit(runs.sft(), data, tmp_path)


def test_an_empty_list_of_validation_rows_is_refused():
    with pytest.raises(InputError, match=r"data\.validation: there is no source"):
        runs.sft_data(validation=[])


def test_tulu_validate_scores_them(tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"include: [{runs.CONFIGS / 'sft_tiny.yaml'}]\n"
        "data: {init_args: {validation: [{name: held out, rows: "
        f"{runs.ROWS}sft_rows, args: {{count: 5, seed: 7}}}}]}}}}\n"
        f"trainer: {{default_root_dir: {tmp_path / 'run'}}}\n"
    )
    assert cli.main(["validate", "--config", str(config)]) == 0
    assert "val_loss" in capsys.readouterr().out
