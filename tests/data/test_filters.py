"""Filters leave out the rows that they are meant for, each with its reason."""

import logging

import pytest

from tulu_lightning.data.criteria import Keywords, Predicate
from tulu_lightning.data.filters import check
from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.sft import SFTData
from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError


def chat(question, answer, *more):
    turns = [("user", question), ("assistant", answer), *more]
    return [{"role": role, "content": content} for role, content in turns]


def reason(messages, row=None, **settings) -> str | None:
    try:
        check(Source("s", rows="a.b", **settings), 7, messages, row or {})
    except LeftOut as left_out:
        return str(left_out)
    return None


@pytest.mark.parametrize("messages", [chat("", "a"), chat("q", " \n"), chat("q", "a", ("system", ""))])
def test_a_row_with_an_empty_message_is_left_out_unless_kept(messages):
    assert reason(messages) == "with an empty message"
    assert reason(messages, keep_empty=True) is None
    assert reason(chat("q", "a")) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("I was made by OpenAI.", "OpenAI"),
        ("I was made by openai's people", "OpenAI"),
        ("我是OpenAI训练的", "OpenAI"),  # scripts without spaces
        ("ask gpt-4", "GPT"),
        ("ask ChatGPT", None),
        ("openair", None),
        ("a language   model", None),
        ("As a Language Model, I", "language model"),
        ("ÄÖÜ", "äöü"),
        ("C++ is fine", "C++"),
        ("openaı", "openaı"),  # the Turkish i without its dot, which ignoring case takes for one with it
        ("OPENAİ", "OPENAİ"),
    ],
)
def test_keywords_are_whole_words_in_any_case(text, found):
    filters = [Keywords(["OpenAI", "GPT", "language model", "äöü", "C++"])]
    assert reason(chat("q", text), filters=filters) == (f"with the word {found!r}" if found else None)


def test_keywords_look_at_answers_unless_told_otherwise():
    messages = chat("who is OpenAI?", "a company")
    assert reason(messages, filters=[Keywords(["OpenAI"])]) is None
    assert reason(messages, filters=[Keywords(["OpenAI"], roles=["user"])]) == "with the word 'OpenAI'"
    text = [{"role": "text", "content": "OpenAI"}]
    assert reason(text, filters=[Keywords(["OpenAI"])]) == "with the word 'OpenAI'"


def test_a_predicate_of_ones_own_sees_messages_and_row(tmp_path, monkeypatch):
    (tmp_path / "my_filters.py").write_text(
        "def short(messages, row): return len(messages[-1]['content']) < row['limit']"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = Predicate("my_filters.short")
    assert reason(chat("q", "aaa"), {"limit": 4}, filters=[own]) is None
    assert reason(chat("q", "aaa"), {"limit": 3}, filters=[own]) == "by short"
    named = Predicate("my_filters.short", reason="too wordy")
    assert reason(chat("q", "aaa"), {"limit": 3}, filters=[named]) == "too wordy"


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Keywords([]), r"filters\.words: is \[\]"),
        (lambda: Keywords(["a", " "]), "no empty one"),
        (lambda: Keywords(["a"], roles=["asistant"]), "no role 'asistant'. Did you mean 'assistant'"),
        (lambda: Keywords(["a"], roles=[]), "no message would be searched"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_refused(make, complaint):
    with pytest.raises(InputError, match=complaint):
        make()


def test_rows_left_out_are_counted_by_source_and_reason(write, caplog):
    rows = [chat("q", "a"), chat("q", ""), chat("q", "by OpenAI"), chat("q", "OpenAI again"), chat("q", "c")]
    source = write([{"messages": messages} for messages in rows])
    filtered = Source("mine", path=source.path, filters=[Keywords(["OpenAI"])])
    data = SFTData(sources=[filtered], tokenizer="tiny-random-llama", max_tokens=200, examples_per_step=4)
    with caplog.at_level(logging.INFO):
        data.setup()
    assert len(data.documents) == 2
    assert caplog.messages[0].endswith("3 left out  1 with an empty message, 2 with the word 'OpenAI'")


def broken(messages, row):
    return row["score"] > 1


def test_a_filter_of_the_users_that_fails_names_the_row_and_itself():
    with pytest.raises(InputError, match=r"source 's', row 7: the filter .*broken fails on it \(KeyError: 'score'\)"):
        reason(chat("q", "a"), filters=[Predicate(f"{__name__}.broken")])
