"""What a prompt row may look like, and how a bad one is refused: the file, the row, what was found, what would do."""

import json
from dataclasses import dataclass

import pytest

from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.prompt_formats import ROUTES, Rules, boxed, read_prompt
from tulu_lightning.data.prompt_source import PassRate, PromptSource
from tulu_lightning.errors import InputError
from tulu_lightning.types import Check, Verdict
from tulu_lightning.verifiers.exact import Exact
from tulu_lightning.verifiers.registry import Verifiers

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
PROMPT = {"messages": [USER], "ground_truth": "68", "verifier": "last_number"}
LAST = Check("last_number", "68")


@dataclass(frozen=True)
class Echo:
    """Uses any target that is JSON."""

    def __call__(self, response: str, target: str) -> Verdict:
        return Verdict("wrong", 0.0)

    def complaint(self, target: str) -> str | None:
        return None if target.startswith(("{", "[")) else "no JSON"


RULES = Rules(Verifiers({"echo": Echo()}), {"sums": "last_number", "MATH": "exact", "gsm8k": "last_number"}, {})


def read(row, rules=RULES, **settings):
    return read_prompt(PromptSource("s", path="rows.jsonl", **settings), 17, row, rules)


def fault(row, **settings) -> InputError:
    with pytest.raises(InputError) as caught:
        read(row, **settings)
    assert caught.value.where.startswith("rows.jsonl, row 17")
    assert caught.value.remedy
    return caught.value


def without(*names, **more):
    return {**{name: value for name, value in PROMPT.items() if name not in names}, **more}


def test_the_routes_are_those_of_the_papers_set():
    assert ROUTES == {"gsm8k": "gsm8k", "MATH": "math", "ifeval": "ifeval_tulu"}


@pytest.mark.parametrize(
    ("row", "settings", "checks", "dataset"),
    [
        (PROMPT, {}, (LAST,), "s"),
        ({**PROMPT, "dataset": "sums"}, {}, (LAST,), "sums"),
        (without("verifier", dataset="sums"), {}, (LAST,), "sums"),
        (without("verifier", dataset="sums", constraint=None), {"verifier": "exact"}, (Check("exact", "68"),), "sums"),
        (PROMPT, {"verifier": "exact", "dataset": "x"}, (LAST,), "x"),  # the row's own verifier wins
        (without("verifier"), {"dataset": "sums"}, (LAST,), "sums"),
        (without("verifier", dataset="MATH"), {"dataset": "sums"}, (Check("exact", "68"),), "MATH"),
        (without("verifier", verifier=None, dataset="sums"), {}, (LAST,), "sums"),  # a column that others use
        (
            without("ground_truth", "verifier", checks=[{"verifier": "last_number", "ground_truth": "68"}]),
            {},
            (LAST,),
            "s",
        ),
        (
            without("verifier", checks=[{"verifier": "last_number"}, {"verifier": "exact", "weight": 0.5}]),
            {"verifier": "echo"},
            (LAST, Check("exact", "68", 0.5)),
            "s",
        ),
        (
            without("verifier", checks=[{"verifier": "exact", "ground_truth": "a", "weight": 2}], verifier=None),
            {},
            (Check("exact", "a", 2.0),),
            "s",
        ),
    ],
)
def test_a_row_leads_to_its_checks(row, settings, checks, dataset):
    assert read(row, **settings) == ([USER], checks, dataset)


@pytest.mark.parametrize("target", [{"func_name": "verify_keywords", "N": None, "word": "é"}, [{"a": 1}, "b"]])
def test_an_object_is_handed_on_as_json(target):
    (check,) = read({**PROMPT, "ground_truth": target, "verifier": "echo"}).checks
    assert json.loads(check.target) == target
    assert "\\u" not in check.target


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"messages": [USER, ANSWER]}, "messages does not end with a user turn"),
        ({"messages": []}, "messages is [], not a list of messages"),
        ({"ground_truth": 68}, "ground_truth is 68, not text"),
        ({"ground_truth": None}, "ground_truth is None, not text"),
        ({"ground_truth": "sixty"}, "verifier 'last_number' cannot use ground_truth: 'sixty' is not a number"),
        ({"ground_truth": {"a": "\ud83d"}, "verifier": "echo"}, "ground_truth has half of a surrogate pair"),
        ({"verifier": "last_numbr"}, "there is no verifier 'last_numbr'"),
        ({"verifier": 3}, "verifier is 3, not text"),
        ({"verifier": None}, "verifier is null"),
        ({"verifier": None, "dataset": "smus"}, "no route leads from the dataset 'smus' to a verifier"),
        ({"verifier": None, "dataset": 3}, "dataset is 3, not text"),
        ({"checks": []}, "both verifier and checks are given"),
        ({"verifier": None, "checks": []}, "checks is [], not a list of checks"),
        ({"verifier": None, "checks": ["exact"]}, "checks[0] is 'exact'"),
        ({"verifier": None, "checks": [{"weight": 1}]}, "checks[0] is {'weight': 1}"),
        ({"verifier": None, "checks": [{"verifier": "exact", "wieght": 1}]}, "checks[0] has the field 'wieght', which"),
        ({"verifier": None, "checks": [{"verifier": "exat"}]}, "there is no verifier 'exat'"),
        ({"verifier": None, "checks": [{"verifier": "exact", "ground_truth": 1}]}, "ground_truth of checks[0] is 1"),
        *(
            ({"verifier": None, "checks": [{"verifier": "exact", "weight": weight}]}, f"weight of checks[0] is {said}")
            for weight, said in [(0, "0"), (-1, "-1"), ("1", "'1'"), (True, "True"), (float("nan"), "nan")]
        ),
    ],
)
def test_a_bad_prompt_row(change, what):
    assert fault({**PROMPT, **change}).what.startswith(what)


@pytest.mark.parametrize(
    ("change", "offered"),
    [
        ({"verifier": "last_numbr"}, "'last_number'"),
        ({"verifier": None, "dataset": "smus"}, "'sums'"),
        ({"verifier": None, "checks": [{"verifier": "exact"}, {"verifier": "exat"}]}, "'exact'"),
        ({"verifier": None, "checks": [{"verifier": "exact", "wieght": 1}]}, "'weight'"),
    ],
)
def test_the_nearest_name_is_offered(change, offered):
    assert f"Did you mean {offered}?" in fault({**PROMPT, **change}).remedy


@pytest.mark.parametrize("field", ["messages", "ground_truth", "verifier"])
def test_a_prompt_row_that_lacks_a_field(field):
    assert fault(without(field)).what.startswith(f"the row has no field {field!r} (it has ")


def test_a_fault_in_one_of_several_checks_names_it():
    checks = [{"verifier": "exact"}, {"verifier": "last_number", "ground_truth": "x"}]
    assert fault(without("verifier", checks=checks)).where == "rows.jsonl, row 17, checks[1]"


# Raw rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "target"), [("18", "18"), (" 1,234,000\n", "1234000"), ("-3.5", "-3.5")])
def test_a_raw_gsm8k_row(number, target):
    row = {"question": "How many?", "answer": f"Steps #### no\n9 <<3*3=9>>.\n#### {number}"}
    found = read(row, read="gsm8k")
    assert found == ([{"role": "user", "content": "How many?"}], (Check("last_number", target),), "gsm8k")
    assert read(row, read="gsm8k", verifier="exact", dataset="mine")[1:] == ((Check("exact", target),), "mine")


def test_a_raw_gsm8k_row_without_its_mark():
    assert fault({"question": "q", "answer": "18"}, read="gsm8k").what == "answer is '18', without '####'"


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"So $\boxed{1}$, no: $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"$\fbox{ 3 }$", " 3 "),
        (r"$\boxed 5$.", "5"),
        (r"$\boxed{\{1, 2\}}$ and }", r"\{1, 2\}"),
        (r"$\boxed{[2,5)}$", "[2,5)"),
        (r"$\boxed{a", None),
        ("5", None),
    ],
)
def test_the_answer_of_a_raw_math_row(solution, answer):
    assert boxed(solution) == answer
    row = {"problem": "p", "solution": solution, "level": "Level 1"}
    if answer is None:
        with pytest.raises(LeftOut, match="without a boxed answer"):
            read(row, read="math")
    else:
        assert read(row, read="math") == ([{"role": "user", "content": "p"}], (Check("exact", answer),), "MATH")


def own(row):
    return None if row["n"] < 0 else {"messages": [USER], "ground_truth": str(row["n"]), "verifier": "exact"}


def test_a_reader_of_the_users_own(monkeypatch):
    monkeypatch.setattr("json.own_prompt", own, raising=False)
    assert read({"n": 4, "verifier": "no such"}, read="json.own_prompt").checks == (Check("exact", "4"),)
    with pytest.raises(LeftOut, match="by its reader"):
        read({"n": -4}, read="json.own_prompt")


# Pass rates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "kept"), [(0.1, True), (0.9, True), (0.5, True), (0, False), (0.09, False), (1, False), (0.91, False)]
)
def test_a_pass_rate_is_kept_from_min_to_max(rate, kept):
    bounds = PassRate(0.1, 0.9, field="solved")
    if kept:
        assert read({**PROMPT, "solved": rate}, pass_rate=bounds).checks == (LAST,)
    else:
        with pytest.raises(LeftOut, match=r"^with a pass rate outside of 0.1 to 0.9$"):
            read({**PROMPT, "solved": rate}, pass_rate=bounds)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({}, "the row has no field 'pass_rate' (it has messages, ground_truth, verifier)"),
        ({"pass_rate": None}, "pass_rate is None"),
        ({"pass_rate": "0.5"}, "pass_rate is '0.5'"),
        ({"pass_rate": True}, "pass_rate is True"),
        ({"pass_rate": 50}, "pass_rate is 50"),
    ],
)
def test_a_row_without_a_pass_rate(more, what):
    assert fault({**PROMPT, **more}, pass_rate=PassRate(max=0.9)).what == what


@pytest.mark.parametrize(
    ("bounds", "what"),
    [
        ((0.9, 0.1), "min is 0.9 and max is 0.1"),
        ((-0.1, 0.5), "min is -0.1"),
        ((0.0, 1.5), "min is 0.0 and max is 1.5"),
        ((0.0, 1.0), "0 to 1 leaves nothing out"),
        ((float("nan"), 1.0), "min is nan"),
    ],
)
def test_bounds_that_cannot_be_meant(bounds, what):
    with pytest.raises(InputError, match=f"^pass_rate: {what}"):
        PassRate(*bounds)


def test_the_package_verifiers_are_there_beside_the_runs_own():
    assert isinstance(RULES.verifiers["exact"], Exact)
    assert isinstance(RULES.verifiers["echo"], Echo)
