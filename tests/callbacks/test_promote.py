"""What the promotion asks for, before the run and at its end, what it records, and what a kill in between leaves."""

import json
import os
from types import SimpleNamespace

import pytest
from promotion_runs import Scripted, records, scores, train
from safetensors.torch import load_file

from tulu_lightning.callbacks import promote as module
from tulu_lightning.callbacks.evaluate import Evaluate
from tulu_lightning.callbacks.offer import decide
from tulu_lightning.callbacks.promote import Promote
from tulu_lightning.callbacks.records import Records
from tulu_lightning.callbacks.suite import Suite
from tulu_lightning.checkpoints.identity import weights_digest
from tulu_lightning.checkpoints.promoted import read_record, write_record
from tulu_lightning.core.gain import Look
from tulu_lightning.core.promotion import PromotionRule
from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError

# The decision, from what is on disk -------------------------------------------------------------------------------


def decided(run, before, after, earlier=(), rule=None):
    for moment, found in (("before", before), ("after", after)):
        if found is not None:
            found.to_json(run / "scores" / f"{moment}.json")
    return decide(rule or PromotionRule(), run, "after", Look(), earlier)


def test_a_gain_on_the_same_items_is_promoted(tmp_path):
    assert decided(tmp_path, scores(50), scores(150)).promote


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (None, scores(150), "no held-out scores of the start weights"),
        (scores(50), None, "no held-out scores of the final weights"),
        (scores(50), scores(150, "other"), "do not compare: the settings differ"),
        (scores(50), scores(150, n=201), "do not compare: the items differ (200 and 201)"),
    ],
)
def test_without_scores_that_compare_nothing_is_promoted(before, after, said, tmp_path):
    decision = decided(tmp_path, before, after)
    assert not decision.promote
    assert said in decision.reason


def test_a_gain_is_held_against_what_was_promoted_and_a_guard_against_the_start(tmp_path):
    earlier = [
        {"moment": "step_000002", "decision": {"promote": True}},
        {"moment": "x", "decision": {"promote": False}},
    ]
    scores(120).to_json(tmp_path / "scores" / "step_000002.json")
    gained = decided(tmp_path, scores(60), scores(130), earlier)
    assert gained.difference == pytest.approx(10 / 200)
    guarded = decided(tmp_path, scores(130), scores(110), earlier, PromotionRule(max_loss=0.2))
    assert guarded.difference == pytest.approx(-20 / 200), "not -10: small losses would add up"


# Bad input, before the run ----------------------------------------------------------------------------------------


def setup(promote, *callbacks, data=None):
    promote.setup(SimpleNamespace(callbacks=list(callbacks), datamodule=data), None, "fit")


def test_what_it_needs_is_asked_for_before_the_run():
    promote, evaluate = Promote(), Evaluate([], 4)
    setup(promote, Records(), promote)
    setup(promote, Records(), evaluate, promote)
    with pytest.raises(InputError, match="Promote stands before Evaluate"):
        setup(promote, Records(), promote, evaluate)
    with pytest.raises(InputError, match="there is no Records"):
        setup(promote, evaluate, promote)
    ruled = Promote(PromotionRule())
    with pytest.raises(InputError, match="there is no Evaluate"):
        setup(ruled, Records(), ruled)
    each = Promote(when="each")
    with pytest.raises(InputError, match="when: each, but there is no Evaluate"):
        setup(each, Records(), each)
    with pytest.raises(InputError, match="Evaluate scores only before and after"):
        setup(each, Records(), evaluate, each)
    best = Promote(best="val_accuracy")
    with pytest.raises(InputError, match="there are no validation rows"):
        setup(best, Records(), best)


def test_a_rule_about_a_task_that_is_not_evaluated_is_refused_and_the_nearest_offered():
    evaluate = Evaluate(suite=Suite(["gsm8k", "ifeval"], limit=5))
    ruled = Promote(PromotionRule(gains={"gsm8": 0.0}))
    with pytest.raises(InputError, match="Did you mean 'gsm8k'"):
        setup(ruled, Records(), evaluate, ruled)
    unnamed = Promote()
    with pytest.raises(InputError, match="names no task, and 2 are evaluated"):
        setup(unnamed, Records(), evaluate, unnamed)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"when": "eac"}, "Did you mean 'each'"),
        ({"best": "val_loss", "mode": "low"}, "Promote.mode: is 'low'"),
        ({"mode": "min"}, "Without best nothing reads it"),
        ({"best": "val_loss", "rule": PromotionRule()}, "leave out one of the two"),
        ({"best": "val_loss", "when": "each"}, "leave out one of the two"),
    ],
)
def test_settings_that_clash_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        Promote(**settings)


# A run with a decision after every evaluation ----------------------------------------------------------------------

RIGHT = {"before": 60, "step_000002": 100, "step_000004": 90, "after": 140}
"""Of 200. Look 1 gains 40 over the start, look 2 loses 10 to look 1, look 3 gains 40 over look 1."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Its folder."""
    folder = tmp_path_factory.mktemp("each")
    train(folder, Scripted(RIGHT, every_n_steps=2), Promote(when="each"))
    return folder


def test_each_evaluation_is_decided_on_and_the_better_one_promoted(run):
    found = records(run)
    assert [(r["step"], r["moment"]) for r in found] == [(2, "step_000002"), (4, "step_000004"), (6, "after")]
    assert [r["decision"]["promote"] for r in found] == [True, False, True]
    assert [r["decision"]["difference"] for r in found] == pytest.approx([0.2, -0.05, 0.2])
    assert [(r["decision"]["look"], r["decision"]["looks"]) for r in found] == [(1, 3), (2, 3), (3, 3)]
    assert [r["decision"]["level"] for r in found] == pytest.approx([0.05 / 3] * 3)
    assert os.readlink(run / "promoted") == "exports/step-000006"
    assert sorted(path.name for path in (run / "exports").iterdir()) == ["step-000002", "step-000006"]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["promoted"], summary["promoted_step"]) == (True, 6)
    assert summary["decision"]["reason"].startswith("look 3 of 3: the score rose by 0.2000")


def test_the_record_holds_what_it_takes_to_know_where_the_weights_are_from(run):
    record = read_record(run / "promotions" / "step-000002.json")
    assert record["weights"] == weights_digest(run / "exports" / "step-000002")
    assert record["weights"] != weights_digest(run / "exports" / "step-000006")
    assert record["parent"]["weights"] == weights_digest(record["parent"]["folder"])
    assert record["scores"]["before"]["held-out"]["score"] == pytest.approx(0.3)
    after = record["scores"]["after"]["held-out"]
    assert (after["score"], after["n"]) == (pytest.approx(0.5), 200)
    assert after["low"] < 0.5 < after["high"]
    assert after["settings"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][:2]
    assert record["cost"]["steps"] == 2
    assert record["cost"]["tokens"] == sum(row["tokens"] for row in rows)
    assert record["data"] == record["identity"]["data rows"]
    assert record["code"]["source"]


def test_a_record_is_read_only_and_never_written_over(run, tmp_path):
    path = run / "promotions" / "step-000002.json"
    assert path.stat().st_mode & 0o777 == 0o444
    before = path.read_bytes()
    with pytest.raises(InputError, match="there is a record of this decision already"):
        write_record(path, {"step": 2})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []
    changed = tmp_path / "step-000002.json"
    changed.write_text(before.decode().replace('"promote": true', '"promote": false'))
    with pytest.raises(InputError, match="it was changed after it was written"):
        read_record(changed)


@pytest.mark.parametrize(
    ("point", "step"),
    [
        ("move", 2),
        pytest.param("write_record", 2, marks=pytest.mark.slow),
        pytest.param("move", 6, marks=pytest.mark.slow),
        ("write_record", 6),
    ],
)
def test_a_kill_between_two_of_its_acts_harms_nothing(point, step, run, tmp_path, monkeypatch):
    act = getattr(module, point)

    def killed(*args):
        if args[-1]["step"] == step:
            raise SystemExit("killed")
        return act(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, point, killed)
        with pytest.raises(SystemExit):
            train(tmp_path, Scripted(RIGHT, every_n_steps=2), Promote(when="each"))
    there = {r["step"] for r in records(tmp_path)}
    assert (step in there) == (point == "move")
    assert not (tmp_path / "summary.json").exists()
    link = tmp_path / "promoted"
    assert (os.readlink(link) == "exports/step-000002") if step == 6 else not link.exists()
    checkpoint = tmp_path / "checkpoints" / f"step-{step:06d}.ckpt"
    train(tmp_path, Scripted(RIGHT, every_n_steps=2), Promote(when="each"), ckpt_path=checkpoint)
    for one, other in zip(records(tmp_path), records(run), strict=True):
        assert one["decision"] == other["decision"]
        assert one["weights"] == other["weights"]
    assert os.readlink(tmp_path / "promoted") == "exports/step-000006"
    assert json.loads((tmp_path / "summary.json").read_text())["promoted_step"] == 6


def test_weights_that_are_not_those_of_the_record_are_not_promoted(run, tmp_path):
    record = read_record(run / "promotions" / "step-000002.json")
    with pytest.raises(InputError, match="does not hold the weights that the record of their promotion is about"):
        module.move(tmp_path, record)


def test_more_looks_than_the_rule_plans_are_refused(tmp_path):
    rule = PromotionRule(looks=2)
    with pytest.raises(InputError, match=r"looks: is 2, and this run has 3"):
        train(tmp_path, Scripted(RIGHT, every_n_steps=2), Promote(rule, when="each"))


def test_without_an_evaluation_the_final_weights_are_promoted(tmp_path):
    train(tmp_path, None, Promote())
    (record,) = records(tmp_path)
    assert record["decision"]["promote"]
    assert record["decision"]["reason"] == "no held-out scores to decide by"
    assert (tmp_path / "promoted" / "promotion.json").exists()


# The best by a validation metric -----------------------------------------------------------------------------------


def test_the_best_validation_is_promoted_not_the_last(tmp_path, monkeypatch):
    # Validations after steps 2, 4 and 6 that say 0.5, 0.9 and 0.7.
    told = iter([0.5, 0.9, 0.7])
    monkeypatch.setattr("tulu_lightning.callbacks.best.Best.value_in", lambda self, metrics: next(told))
    train(tmp_path, None, Promote(best="val_accuracy"), kind="reward", val_check_interval=2)
    (record,) = records(tmp_path)
    assert record["step"] == 4
    assert record["decision"]["reason"].startswith("val_accuracy is 0.9000 at step 4, the highest of 3 validations")
    assert os.readlink(tmp_path / "promoted") == "exports/step-000004"
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["step-000004"]
    assert record["cost"]["steps"] == 4
    assert json.loads((tmp_path / "summary.json").read_text())["promoted_step"] == 4


@pytest.mark.slow
def test_the_lowest_loss_can_be_the_best_and_is_what_the_stage_logged(tmp_path):
    train(tmp_path, None, Promote(best="val_loss", mode="min"), kind="reward", val_check_interval=2)
    lines = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["val_loss"])
    (record,) = records(tmp_path)
    assert record["step"] == best["step"]
    assert f"val_loss is {best['val_loss']:.4f}" in record["decision"]["reason"]
    assert load_file(tmp_path / "promoted" / "model.safetensors")


def test_a_metric_that_no_validation_gives_is_refused(tmp_path):
    with pytest.raises(InputError, match="Did you mean 'val_accuracy'"):
        train(tmp_path, None, Promote(best="val_acuracy"), kind="reward", val_check_interval=2)


# The tasks' names are the config's ---------------------------------------------------------------------------------


def test_names_are_those_of_the_config():
    sums = Source("sums", rows="tulu_lightning.assets.arithmetic.heldout_rows", args={"count": 6})
    assert Evaluate([sums], 4).names == ["held-out"]
    assert Evaluate([sums], 4, suite=Suite(["math", "gsm8k", "math"])).names == ["held-out", "math", "gsm8k"]


@pytest.mark.parametrize(
    ("settings", "every", "interval", "most"),
    [
        ({}, 3, 1.0, 1),
        ({"when": "each"}, 3, 1.0, 4),  # after steps 3, 6, 9 and 10
        ({"best": "val_loss"}, 0, 4, 3),  # after 4 and 8, and the last
        ({"best": "val_loss"}, 0, 0.25, 5),
    ],
)
def test_how_many_exports_the_disk_may_have_to_hold(settings, every, interval, most):
    rows = "tulu_lightning.assets.arithmetic.heldout_rows"
    evaluate = Evaluate(sources=[Source("sums", rows=rows)], every_n_steps=every, max_new_tokens=8)
    promote = Promote(**settings)
    trainer = SimpleNamespace(callbacks=[evaluate, promote], val_check_interval=interval)
    assert promote.most_exports(SimpleNamespace(trainer=trainer, total_steps=10)) == most
