"""What the promotion asks for, before the run and at its end, and what it records."""

import json
from types import SimpleNamespace

import pytest

from tulu_lightning.callbacks.evaluate import Evaluate
from tulu_lightning.callbacks.promote import Promote
from tulu_lightning.callbacks.records import Records
from tulu_lightning.core.promotion import PromotionRule
from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.heldout import Item, Scores


def scores(right, settings="s", n=200):
    def item(row):
        good = row < right
        return Item(
            row=row,
            prompt=f"{row}?",
            target="1",
            response="1" if good else "2",
            outcome="right" if good else "wrong",
            score=float(good),
            tokens=1,
            finish="stop",
        )

    return Scores("held-out", 1, settings, 0, tuple(item(row) for row in range(n)))


def evaluated(before, after):
    evaluate = Evaluate([], 4)
    evaluate.before, evaluate.after = before, after
    return evaluate


def decide(*callbacks):
    promote = Promote()
    return promote._decide(SimpleNamespace(callbacks=[*callbacks, promote]))


def test_a_gain_on_the_same_items_is_promoted():
    assert decide(evaluated(scores(50), scores(150))).promote


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (None, scores(150), "no held-out scores of the start weights"),
        (scores(50), None, "no held-out scores of the final weights"),
        (scores(50), scores(150, "other"), "do not compare: the settings differ"),
        (scores(50), scores(150, n=201), "do not compare: the items differ"),
    ],
)
def test_without_scores_that_compare_nothing_is_promoted(before, after, said):
    decision = decide(evaluated(before, after))
    assert not decision.promote
    assert said in decision.reason


def test_without_an_evaluation_the_final_weights_are_promoted():
    assert decide().promote


def setup(promote, *callbacks):
    promote.setup(SimpleNamespace(callbacks=list(callbacks)), None, "fit")


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


def test_the_closing_record_has_the_digest_of_the_start_weights(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"seconds": 1.5, "tokens": 7, "trained_tokens": 3}) + "\n")
    stage = SimpleNamespace(step=1, start="runs/sft/promoted", start_digest="abc")
    Promote()._record(tmp_path, stage, tmp_path / "exports", decide())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["start"], summary["start_digest"]) == ("runs/sft/promoted", "abc")
