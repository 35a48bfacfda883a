"""Rows that a data module leaves out: each is counted by source and reason, and none is cut."""

import logging

import pytest

from tulu_lightning.data.preference import PreferenceData
from tulu_lightning.data.prompts import PromptData
from tulu_lightning.data.sft import SFTData
from tulu_lightning.errors import InputError

SETTINGS = {"tokenizer": "tiny-random-llama", "max_tokens": 200, "examples_per_step": 4}


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def pair(prompt: str, chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def prompt(question: str) -> dict:
    return {
        "messages": [{"role": "user", "content": question}],
        "ground_truth": "1",
        "verifier": "last_number",
    }


@pytest.fixture
def make(write):
    """A data module over the given rows, with any setting changed."""
    return lambda module, rows, **settings: module(sources=[write(rows)], **{**SETTINGS, **settings})


def test_rows_over_the_limit_are_left_out_with_a_table_by_source(write, caplog):
    sources = [write([chat("q", "a")] * 2, "short"), write([chat("q", "a"), chat("q", "a" * 999)], "mixed")]
    data = SFTData(sources=sources, **SETTINGS)
    with caplog.at_level(logging.INFO):
        data.setup()
    assert len(data.documents) == 3
    assert caplog.messages == [
        "rows by source:\n"
        "  short         2 kept         0 left out\n"
        "  mixed         1 kept         1 left out  1 longer than 200 tokens"
    ]


def test_a_row_at_the_limit_is_kept_and_one_over_it_is_not(make):
    length = 25 + 3  # "<|user|>\nq\n<|assistant|>\n", then the answer "ab" and its end
    assert len(make(SFTData, [chat("q", "ab")], template="tulu", max_tokens=length).documents) == 1
    with pytest.raises(InputError, match="every row was left out"):
        make(SFTData, [chat("q", "ab")], template="tulu", max_tokens=length - 1).setup()


def test_a_pairs_length_is_that_of_the_prompt_with_the_longer_answer(make):
    row = pair("q", "good", "no")  # 25 + 5 and 25 + 3
    assert len(make(PreferenceData, [row], template="tulu", max_tokens=30).documents) == 1
    with pytest.raises(InputError, match="1 longer than 29 tokens"):
        make(PreferenceData, [row], template="tulu", max_tokens=29).setup()


@pytest.mark.parametrize("module", [SFTData, PreferenceData, PromptData])
def test_overflow_can_stop_the_run_with_the_rows_name_and_length(make, module):
    rows = {SFTData: (chat, "a"), PreferenceData: (pair, "a", "b"), PromptData: (prompt,)}
    row, *answers = rows[module]
    with pytest.raises(InputError, match=r"row 3: the row has 3\d\d tokens, and max_tokens is 200"):
        make(module, [row("q", *answers)] * 2 + [row("q" * 300, *answers)], on_overflow="error").setup()


def test_a_source_of_which_nothing_is_left_stops_the_run(write):
    sources = [write([chat("q", "a")], "good"), write([chat("q", "a" * 999)] * 3, "long")]
    with pytest.raises(InputError, match=r"source 'long': every row was left out \(3 longer than 200 tokens\)"):
        SFTData(sources=sources, **SETTINGS).setup()


def test_pairs_that_teach_nothing_are_left_out_and_counted_by_reason(make, caplog):
    rows = [
        pair("q", "good", "bad"),
        pair("q", "same", "same"),
        pair("q", "", "bad"),
        pair("q", "good", " \n"),
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": []},
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]},
    ]
    data = make(PreferenceData, rows)
    with caplog.at_level(logging.INFO):
        assert len(data.documents) == 1
    assert caplog.messages[0].endswith("1 kept         5 left out  3 with an empty answer, 2 with equal answers")


def test_an_empty_answer_is_left_out_of_sft(make):
    assert len(make(SFTData, [chat("q", "a"), chat("q", " ")]).documents) == 1
