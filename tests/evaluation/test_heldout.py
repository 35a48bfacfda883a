import json
import os
from collections.abc import Sequence

import pytest
import torch
from transformers import AutoTokenizer

from tulu_lightning.core.stats import wilson
from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.heldout import HeldOut, Scores, compare, evaluate
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.types import Check, Completion, Prompt, Sampling

SAMPLING = Sampling(8, 0.0, (258,))


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


class Scripted:
    """An engine that says what it was told to say."""

    version = 4

    def __init__(self, tokenizer, answers: Sequence[str]) -> None:
        self.ids = [torch.tensor(tokenizer.encode(a + "<|im_end|>", add_special_tokens=False)) for a in answers]

    def generate(self, prompts, n, sampling, seed, *, keys=None, progress=None):
        assert (len(prompts), n) == (len(self.ids), 1)
        return [[Completion(ids, torch.zeros(len(ids)), "stop", self.version)] for ids in self.ids]


def prompts(*targets: str) -> tuple[Prompt, ...]:
    return tuple(Prompt((1, 2), (Check("last_number", t),), f"What is {t}?", 10 + i) for i, t in enumerate(targets))


ASKED = prompts("1", "2", "3", "-4")


def scores(tokenizer, *answers: str, **settings) -> Scores:
    return evaluate(Scripted(tokenizer, answers), tokenizer, ASKED, SAMPLING, **settings)


def test_items_and_sums_are_right(tokenizer):
    result = scores(tokenizer, "1", "so 22", "none", "-4")
    assert result.n == 4
    assert result.accuracy == 0.5
    assert result.interval == wilson(2, 4)
    assert result.per_item == [1.0, 0.0, 0.0, 1.0]
    assert result.outcomes == {"right": 2, "wrong": 1, "unparseable": 1}
    assert result.mean_tokens == (2 + 6 + 5 + 3) / 4  # one token a byte, and the end token
    assert result.weights_version == 4
    assert result.items[1] == {
        "row": 11,
        "prompt": "What is 2?",
        "target": "2",
        "response": "so 22",
        "outcome": "wrong",
        "score": 0.0,
        "tokens": 6,
        "finish": "stop",
    }


def test_a_real_engine_is_evaluated_the_same_twice(tiny, tokenizer):
    task = HeldOut(ASKED, SAMPLING, "toy", 3)
    engine, seen = LocalEngine.from_folder(tiny), []
    first = task.evaluate(engine, tokenizer, progress=lambda done, total: seen.append((done, total)))
    assert first == task.evaluate(engine, tokenizer)
    assert (first.name, first.version, seen[-1]) == ("toy", 3, (4, 4))


def test_a_file_gives_back_the_same_scores(tokenizer, tmp_path):
    result, path = scores(tokenizer, "1", "2", "drei \u2212 3", "x"), tmp_path / "new" / "scores.json"
    result.to_json(path)
    assert Scores.from_json(path) == result
    assert json.loads(path.read_text())["summary"]["accuracy"] == 0.75
    assert [p.name for p in path.parent.iterdir()] == ["scores.json"]  # nothing temporary is left


def test_an_interrupted_write_keeps_the_old_file(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    old, new = scores(tokenizer, "1", "2", "3", "4"), scores(tokenizer, "x", "x", "x", "x")
    old.to_json(path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="cannot be written \\(No space left on device\\)"):
        new.to_json(path)
    assert Scores.from_json(path) == old
    assert [p.name for p in tmp_path.iterdir()] == ["scores.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"summary": {}, "items": [{}]}', '{"summary": {}, "items": [], "x": 1}']
)
def test_a_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(InputError, match="does not hold scores"):
        Scores.from_json(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        Scores.from_json(tmp_path / "scores.json")


def test_comparison_is_paired(tokenizer):
    before, after = scores(tokenizer, "1", "x", "x", "x"), scores(tokenizer, "1", "2", "x", "x")
    result = compare(before, after)
    assert result.difference == 0.25
    assert result.low < 0 < result.high, "one more of four is nothing beyond chance"


def test_other_items_do_not_compare(tokenizer):
    before = scores(tokenizer, "1", "2", "3", "4")
    other = evaluate(Scripted(tokenizer, ["1"] * 3), tokenizer, ASKED[:3], SAMPLING)
    with pytest.raises(InputError, match="the items differ \\(4 before, 3 after\\)"):
        compare(before, other)


@pytest.mark.parametrize("settings", [{"version": 2}, {"seed": 1}, {"name": "other"}])
def test_other_settings_do_not_compare(tokenizer, settings):
    answers = ("1", "2", "3", "4")
    with pytest.raises(InputError, match="the settings differ"):
        compare(scores(tokenizer, *answers), scores(tokenizer, *answers, **settings))


def test_sampling_and_rendering_are_settings(tokenizer):
    def settings(asked, sampling):
        return evaluate(Scripted(tokenizer, ["1"] * 4), tokenizer, asked, sampling).settings

    base = settings(ASKED, SAMPLING)
    assert settings(ASKED, SAMPLING._replace(max_new_tokens=9)) != base
    assert settings([p._replace(ids=(1, 3)) for p in ASKED], SAMPLING) != base
    assert settings([p._replace(checks=(Check("exact", p.target),)) for p in ASKED], SAMPLING) != base
    # The order of stop ids means nothing.
    assert settings(ASKED, SAMPLING._replace(stop_ids=(5, 258))) == settings(
        ASKED, SAMPLING._replace(stop_ids=(258, 5))
    )


def test_an_empty_set_is_refused(tokenizer):
    with pytest.raises(InputError, match="held-out set is empty"):
        evaluate(Scripted(tokenizer, []), tokenizer, [], SAMPLING)
