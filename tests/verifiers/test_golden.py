"""Every hand-made audit case of the text and maths verifiers, in this process; `tulu verify audit` runs them in the pool."""

import json
from collections import Counter
from pathlib import Path

import pytest

import tulu_lightning.verifiers
from tulu_lightning.verifiers.registry import get

FOLDER = Path(tulu_lightning.verifiers.__path__[0]) / "golden"
NAMES = ("exact", "gsm8k", "math", "math_strict", "multiple_choice", "regex", "string_f1")
CASES = {
    name: [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    for name in NAMES
}


def response(case: dict) -> str:
    return case.get("response", "".join(text * times for text, times in case.get("response_parts", ())))


@pytest.mark.parametrize("name", NAMES)
def test_every_case_comes_out_as_its_reason_says(name):
    wrong = []
    for case in CASES[name]:
        if "timeout" in case["outcome"]:  # for a process that can be killed
            continue
        verdict = get(name)(response(case), case["target"])
        if verdict.outcome != case["outcome"] or (verdict.outcome == "right") != (verdict.score == 1.0):
            wrong.append((ascii(response(case))[:100], case["target"], case["outcome"], verdict, case["reason"]))
    assert not wrong


@pytest.mark.parametrize("name", NAMES)
def test_every_target_is_one_that_its_verifier_can_use(name):
    assert [case["target"] for case in CASES[name] if get(name).complaint(case["target"])] == []


def test_cases_are_many_and_of_both_kinds_and_outcomes():
    assert sum(map(len, CASES.values())) >= 170
    assert len(CASES["math"]) >= 80
    assert len(CASES["gsm8k"]) >= 40
    for name, cases in CASES.items():
        assert {case["verifier"] for case in cases} == {name}
        assert {case["kind"] for case in cases} == {"golden", "adversarial"}
        assert {"right", "wrong", "unparseable"} <= {case["outcome"] for case in cases}
        assert all(case["reason"] for case in cases)
        repeated = Counter((response(case), case["target"]) for case in cases)
        assert repeated.most_common(1)[0][1] == 1


@pytest.mark.parametrize(("name", "least"), [("gsm8k", 15), ("math", 30)])
def test_the_release_errs_where_the_cases_say_so(name, least):
    """The cases are worth nothing if the release's verifier passes them: it must fail in both directions."""
    false = Counter()
    for case in CASES[name]:
        text = response(case)
        # What only a guard keeps from taking minutes is left to the audit.
        if len(text) > 200 or any(word in case["reason"] for word in ("evaluated", "minutes", "never", "parsed")):
            continue
        said, wanted = get(f"{name}_release")(text, case["target"]).outcome, case["outcome"]
        if (said == "right") != (wanted == "right"):
            false["positive" if said == "right" else "negative"] += 1
    assert false.total() >= least
    assert min(false["positive"], false["negative"]) >= 5
