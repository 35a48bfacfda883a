"""The audit: its cases are well-formed and many, every verifier passes its own, and a miss is told for what it is."""

import json
from collections import Counter

import pytest

from tulu_lightning.errors import InputError
from tulu_lightning.launch import audit, verify
from tulu_lightning.rollout.pool import PoolLimits
from tulu_lightning.types import Outcome, Verdict
from tulu_lightning.verifiers.code import Code
from tulu_lightning.verifiers.registry import VERIFIERS

CASES = audit.read_cases()


def test_there_are_many_cases_each_with_a_reason_of_its_own():
    assert len(CASES) >= (400 if {"ifeval", "math"} <= VERIFIERS.keys() else 150)
    assert all(case.reason.strip() for case in CASES)
    assert all(set(case.outcomes) <= set(Outcome.__args__) for case in CASES)
    told = Counter((case.place.split(",")[0], case.verifier, case.response, case.target) for case in CASES)
    assert max(told.values()) == 1
    reasons = Counter((case.verifier, case.reason) for case in CASES if case.verifier in ("code", "judge"))
    # The bodies of HumanEval and the scales of five share theirs with nobody.
    assert [reason for reason, times in reasons.items() if times > 2] == []


@pytest.mark.parametrize("name", ["code", "judge"])
def test_the_verifiers_pass_their_cases(name, monkeypatch):
    monkeypatch.setitem(VERIFIERS, "code", Code(seconds=1.5))  # endless programs are half of the test's time
    cases = audit.cases_for(name, CASES)
    assert len(cases) >= 30
    misses = [(r.case.place, r.case.reason, r.verdict) for r in audit.audit(cases, PoolLimits(seconds=30)) if r.miss]
    assert misses == []


def test_answers_that_attack_get_a_verdict_and_never_a_point():
    cases = [case for case in CASES if case.place.startswith("adversarial.jsonl") and case.verifier in VERIFIERS]
    misses = [(r.case.place, r.case.reason, r.verdict) for r in audit.audit(cases, PoolLimits(seconds=3)) if r.miss]
    assert misses == []


def case(outcomes: str, verifier: str = "exact") -> audit.Case:
    return audit.Case(verifier, "a", "a", tuple(outcomes.split("|")), "a reason", False, "x.jsonl, line 1")


@pytest.mark.parametrize(
    ("wanted", "said", "miss"),
    [
        ("right", "right", ""),
        ("wrong|timeout", "timeout", ""),
        ("right", "wrong", "false negative"),
        ("right", "timeout", "false negative"),
        ("wrong", "right", "false positive"),
        ("unparseable", "right", "false positive"),
        ("unparseable", "wrong", "other miss"),
        ("wrong|unparseable", "error", "other miss"),
    ],
)
def test_a_miss_has_a_kind(wanted, said, miss):
    assert audit.Result(case(wanted), Verdict(said, 0.0)).miss == miss


def test_a_release_runs_the_cases_of_its_family():
    cases = [case("right", name) for name in ("math", "math", "math_strict", "ifeval", "ifeval_tulu")]

    def chosen(name):
        return [found.verifier for found in audit.cases_for(name, cases)], len(audit.cases_for(name, cases))

    assert chosen(None)[1] == 5
    assert chosen("math") == (["math"] * 2, 2)
    assert chosen("math_strict") == (["math_strict"], 1)
    assert chosen("math_release") == (["math_release"] * 2, 2)
    assert chosen("ifeval_tulu_release") == (["ifeval_tulu_release"], 1)
    with pytest.raises(InputError, match="there are no cases for 'mathematics'"):
        audit.cases_for("mathematics", cases)


def test_misses_are_printed_with_their_reason_and_make_the_status_1(tmp_path, monkeypatch, capsys):
    lines = [
        {"verifier": "exact", "response": "a", "target": "b", "outcome": "right", "reason": "first", "kind": "golden"},
        {"verifier": "exact", "response": "b", "target": "b", "outcome": "wrong", "reason": "second", "kind": "golden"},
        {"verifier": "exact", "response": "", "target": "b", "outcome": "wrong", "reason": "third", "kind": "golden"},
        {
            "verifier": "last_number",
            "response_parts": [["x", 300], ["1", 1]],
            "target": "1",
            "outcome": "right",
            "reason": "fourth",
            "kind": "adversarial",
        },
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cases = audit.read_cases(tmp_path)
    monkeypatch.setattr(audit, "read_cases", lambda: cases)
    assert verify.main(["audit"]) == 1
    shown = capsys.readouterr().out
    assert [line.split() for line in shown.splitlines()[1:4]] == [
        ["exact", "3", "0", "1", "1", "1"],
        ["last_number", "1", "1", "0", "0", "0"],
        ["all", "4", "1", "1", "1", "1"],
    ]
    assert "false negative: exact, x.jsonl, line 1: said wrong, not right\n  reason    first" in shown
    assert "false positive: exact, x.jsonl, line 2: said right, not wrong\n  reason    second" in shown
    assert "other miss: exact, x.jsonl, line 3: said unparseable, not wrong\n  reason    third" in shown
    assert "fourth" not in shown
    assert verify.main(["audit", "--verifier", "last_number"]) == 0


def test_bad_cases_and_names_are_told(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text('{"verifier": "exact", "response": "a"}\n')
    with pytest.raises(InputError, match=r"x\.jsonl, line 1: is no case .*target"):
        audit.read_cases(tmp_path)
    with pytest.raises(InputError, match=r"no verifier 'cod'\. Did you mean 'code'"):
        verify.main(["audit", "--verifier", "cod"])
    with pytest.raises(InputError, match="line 1: verifier 'exact' cannot use its target"):
        audit.audit([case("right")._replace(target=" ")])
