import json
import pickle
from collections import Counter
from importlib import resources

import pytest

from tulu_lightning.types import Verdict
from tulu_lightning.verifiers import if_text, registry
from tulu_lightning.verifiers.ifeval import IFEval
from tulu_lightning.verifiers.ifeval_rules import RULES as OFFICIAL
from tulu_lightning.verifiers.ifeval_tulu import IFEvalTulu
from tulu_lightning.verifiers.ifeval_tulu_rules import RULES as TULU


def golden(name: str) -> list[dict]:
    text = (resources.files("tulu_lightning.verifiers") / "golden" / f"{name}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def ids(name: str) -> list[str]:
    return [f"{name}:{number}" for number in range(1, 1 + len(golden(name)))]


def row(*names: str, **arguments) -> str:
    return json.dumps({"instruction_id_list": names, "kwargs": [arguments] * len(names)})


CASES = [*golden("ifeval"), *golden("ifeval_tulu")]


@pytest.mark.parametrize("case", CASES, ids=[*ids("ifeval"), *ids("ifeval_tulu")])
def test_golden_cases_come_out_as_their_reasons_say(case):
    verifier = registry.get(case["verifier"])
    assert verifier.complaint(case["target"]) is None
    verdict = verifier(case["response"], case["target"])
    assert verdict == Verdict(case["outcome"], float(case["outcome"] == "right")), case["reason"]


def test_golden_cases_hold_every_constraint_followed_and_not():
    seen = Counter((name, case["outcome"]) for case in CASES for name in asked(case))
    assert len(CASES) >= 150
    assert len(OFFICIAL) == len(TULU) == 25
    assert {name for name, _ in seen} == {*OFFICIAL, *TULU}
    assert all(seen[name, outcome] for name in {*OFFICIAL, *TULU} for outcome in ("right", "wrong"))


def asked(case: dict) -> list[str]:
    """Names of a case's constraints, if there is only one: then the outcome is about that one."""
    target = json.loads(case["target"])
    names = [item["func_name"] for item in target] if isinstance(target, list) else target.get("instruction_id_list")
    names = [target["func_name"]] if names is None else names
    return names if len(names) == 1 else []


def test_the_release_is_wrong_exactly_where_the_cases_say_so():
    release = registry.get("ifeval_tulu_release")
    for case in golden("ifeval_tulu"):
        if case["verifier"] == "ifeval_tulu":
            differs = release(case["response"], case["target"]).outcome != case["outcome"]
            assert differs == ("release" in case["reason"]), case


def test_partial_scores_the_share_that_is_followed():
    target = json.dumps(
        {"instruction_id_list": ["punctuation:no_comma", "startend:quotation", "detectable_format:title"]}
    )
    assert IFEval(partial=True)('"a <<b>>"', target) == Verdict("right", 1.0)
    assert IFEval(partial=True)("a <<b>>", target) == Verdict("wrong", 2 / 3)
    assert IFEval()("a <<b>>", target) == Verdict("wrong", 0.0)
    several = json.dumps([{"func_name": "validate_lowercase"}, {"func_name": "validate_no_commas"}])
    assert IFEvalTulu(partial=True)("a, b", several) == Verdict("wrong", 0.5)


def test_each_instruction_may_be_followed_in_another_reading():
    # The quotation marks show without the first line, the title only with it.
    target = json.dumps({"instruction_id_list": ["startend:quotation", "detectable_format:title"]})
    assert IFEval(loose=True)('<<Rain>>\n"It rains."', target).outcome == "right"
    assert IFEval()('<<Rain>>\n"It rains."', target).outcome == "wrong"


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("sixty", "'sixty' is not JSON"),
        ("[1]", "not an object with instruction_id_list"),
        ("[" * 100_000, "is not JSON"),
        (row(), "instruction_id_list is []"),
        (row("punctuation:no_coma"), "no constraint 'punctuation:no_coma': Did you mean 'punctuation:no_comma'?"),
        (row("punctuation:no_comma", num_words=3), "punctuation:no_comma has no argument 'num_words': It takes none"),
        (row("length_constraints:number_words", num_word=3), "no argument 'num_word': Did you mean 'num_words'?"),
        (row("length_constraints:number_words", num_words=3), "lacks its argument 'relation'"),
        (row("length_constraints:number_words", num_words=3.5, relation="at least"), "num_words of length_constraints:number_words is 3.5, not a whole"),
        (row("length_constraints:number_words", num_words=True, relation="at least"), "is True, not a whole"),
        (row("length_constraints:number_words", num_words=3, relation="over"), "is 'over', none of 'less than', 'at least'"),
        (row("length_constraints:number_paragraphs", num_paragraphs=0), "not a whole number from 1 up"),
        (row("length_constraints:number_paragraphs", num_paragraphs=float("nan")), "not a whole number"),
        (row("keywords:existence", keywords="river"), "keywords of keywords:existence is 'river', not a list of texts"),
        (row("keywords:existence", keywords=["(x"]), "read as a regular expression and is none"),
        (row("keywords:letter_frequency", letter="ab", let_frequency=1, let_relation="at least"), "not one character"),
        (row("startend:end_checker", end_phrase=" "), "is ' ', not a text"),
        (row("length_constraints:nth_paragraph_first_word", num_paragraphs=2, nth_paragraph=3, first_word="a"), "nth_paragraph is 3, and there are to be 2"),
        (json.dumps({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}), "1 instructions and 0 kwargs"),
        (json.dumps({"instruction_id_list": ["punctuation:no_comma"], "kwargs": ["x"]}), "are 'x', not an object"),
    ],
)  # fmt: skip
def test_a_target_that_cannot_be_used_is_named_and_refused(target, complaint):
    found = IFEval().complaint(target)
    assert found is not None
    assert complaint in found


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("{}", "not an object with func_name"),
        ("[]", "empty"),
        ('["validate_title"]', "not an object with func_name"),
        ('{"func_name": "verify_keyword"}', "Did you mean 'verify_keywords'?"),
        ('{"func_name": "verify_keywords"}', "lacks its argument 'keyword_list'"),
        ('{"func_name": "verify_keywords", "keyword_list": null}', "lacks its argument 'keyword_list'"),
        ('{"func_name": "validate_title", "N": 3}', "validate_title has no argument 'N'"),
        ('{"func_name": "validate_paragraphs", "N": 2, "i": 3, "first_word": "a"}', "i is 3, and there are to be 2"),
        ('{"func_name": "verify_letter_frequency", "N": 2, "letter": "ab"}', "not one character"),
        ('{"func_name": "validate_word_constraint", "N": 2, "quantifier": "less than"}', "none of 'at least'"),
        ('{"func_name": "validate_choice", "options": []}', "not a list of texts"),
    ],
)
@pytest.mark.parametrize("release", [False, True])
def test_a_target_in_tulus_schema_that_cannot_be_used_is_named_and_refused(target, complaint, release):
    found = IFEvalTulu(release=release).complaint(target)
    assert found is not None
    assert complaint in found


def test_a_bad_target_is_a_value_error_when_called():
    for name in ("ifeval", "ifeval_tulu"):
        with pytest.raises(ValueError, match="60"):
            registry.get(name)("yes", "60")


def test_whole_numbers_may_come_as_floats_and_options_as_one_text():
    assert IFEval()("* a\n* b", row("detectable_format:number_bullet_lists", num_bullets=2.0)).outcome == "right"
    target = json.dumps({"func_name": "validate_choice", "options": "(red, green or blue)"})
    assert [IFEvalTulu()(text, target).outcome for text in ("blue", "yellow")] == ["right", "wrong"]


def test_missing_nltk_data_are_a_complaint_of_the_two_constraints_that_need_them(monkeypatch):
    import nltk

    if_text._punkt.cache_clear()
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(if_text, "DATA_HOLDER", "no-such-distribution")
    try:
        needy = {name for name, rule in OFFICIAL.items() if "nltk.downloader punkt_tab" in (rule.complaint({"nth_paragraph": 1, "num_paragraphs": 1}) or "")}  # fmt: skip
        assert needy == {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
        target = row("length_constraints:number_sentences", num_sentences=2, relation="at least")
        assert "NLTK_DATA" in str(IFEval().complaint(target))
    finally:
        if_text._punkt.cache_clear()


def test_the_language_of_a_text_is_the_same_every_time():
    text = "no si la pero more le"  # drawn at random, this is now one language and now another
    assert len({if_text.language(text) for _ in range(20)}) == 1


HARD = {
    "digits": "7" * 200_000,
    "brackets": "[" * 200_000,
    "angles": "<" * 200_000,
    "stars": "*" * 200_000,
    "stars apart": "* " * 100_000,
    "blank lines": "\n" * 100_000 + "x",
    "quotes": '."' * 100_000,
    "dashes": "-" * 200_000,
    "surrogates": "\ud800 \udfff." * 1000,
    "letters": "a" * 200_000,
    "braces": "{" * 200_000,
}


ARGUMENTS = {
    **{"N": 3, "quantifier": "around", "keyword_list": ["a"], "word": "a", "forbidden_words": ["b"], "letter": "a"},
    **{"language": "en", "first_word": "a", "i": 1, "postscript_marker": "P.S.", "options": ["a", "b"]},
    **{"section_splitter": "Section", "original_prompt": "b", "end_phrase": "b", "keywords": ["a"], "keyword": "a"},
    **{"section_spliter": "Section", "prompt_to_repeat": "b", "nth_paragraph": 1, "num_paragraphs": 3},
}
OF_LIBRARIES = ("language", "number_sentences", "english", "capital_word_frequency")
"""Constraints that nltk or langdetect judge: these take their time, which the scoring pool bounds."""


@pytest.mark.parametrize("text", HARD.values(), ids=HARD)
def test_own_patterns_take_one_pass_over_a_hostile_text(text):
    # One that goes back at every place takes minutes on some of these.
    for rules, verify in ((TULU, IFEvalTulu()), (TULU, IFEvalTulu(release=True)), (OFFICIAL, IFEval(loose=True))):
        for name, rule in rules.items():
            if any(part in name for part in OF_LIBRARIES):
                continue
            given = {key: ARGUMENTS.get(key, "at least" if "relation" in key else 3) for key in rule.arguments}
            target = {"func_name": name, **given} if rules is TULU else json.loads(row(name, **given))
            assert verify(text, json.dumps(target)).outcome in ("right", "wrong")


@pytest.mark.parametrize("name", ["ifeval", "ifeval_loose", "ifeval_tulu", "ifeval_tulu_loose", "ifeval_tulu_release"])
def test_they_are_found_by_name_run_in_the_pool_and_can_be_sent_there(name):
    verifier = registry.get(name)
    assert registry.runs_in(verifier) == "pool"
    assert pickle.loads(pickle.dumps(verifier)) == verifier
