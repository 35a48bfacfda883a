"""Rows that a data module leaves out, or cuts: each is counted by source and reason."""

import logging
from collections import Counter
from dataclasses import replace

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


# Length -------------------------------------------------------------------------------------------------------------


def talk(*answers: str) -> dict:
    """Questions of one letter, each with its answer; "<|user|>\\nq\\n<|assistant|>\\n" is 25 tokens of bytes."""
    turns = [({"role": "user", "content": "q"}, {"role": "assistant", "content": answer}) for answer in answers]
    return {"messages": [message for turn in turns for message in turn]}


def test_a_cut_row_ends_as_an_answer_ends(make, caplog):
    row = talk("ab", "c" * 100, "d" * 100)
    fits, cut = (25 + 3), (25 + 3 + 1) + (25 + 101)  # a newline stands between the end token and the next question
    for limit, length in ((fits, fits), (cut - 1, None), (cut, cut), (cut + 30, None), (400, 282)):
        data = make(SFTData, [row], template="tulu", max_tokens=limit, on_overflow="truncate")
        ((segment,),) = data.documents[0]
        assert len(segment.ids_L) <= limit
        assert length is None or len(segment.ids_L) == length
        assert segment.ids_L[-1] == 258  # the byte tokenizer's <|im_end|>
        assert segment.weights_L[-1] == 1.0
        assert data.manifest()["totals"]["truncated"] == (limit < 282)


def test_the_table_says_how_many_were_cut(make, caplog):
    with caplog.at_level(logging.INFO):
        make(SFTData, [talk("a"), talk("a", "b" * 200)], on_overflow="truncate", template="tulu").setup()
    assert caplog.messages == ["rows by source:\n  rows         2 kept         1 cut         0 left out"]


def test_a_source_may_lose_only_so_much_to_length(make):
    rows = [chat("q", "a")] * 3 + [chat("q", "a" * 999)] * 2  # 40%
    assert len(make(SFTData, rows).documents) == 3
    assert len(make(SFTData, rows, max_dropped_share=0.4).documents) == 3
    said = (
        r"source 'rows': 2 of 5 rows \(40%\) are too long, more than max_dropped_share \(39%\) allows. Raise max_tokens"
    )
    with pytest.raises(InputError, match=said):
        make(SFTData, rows, max_dropped_share=0.39).setup()
    with pytest.raises(InputError, match="3 of 5 rows"):  # half is the default
        make(SFTData, rows[1:] + rows[-1:]).setup()


def test_what_is_left_out_for_other_reasons_does_not_count_as_too_long(make):
    rows = [chat("q", "a"), *[chat("q", " ")] * 5]
    assert len(make(SFTData, rows, max_dropped_share=0.0).documents) == 1


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_from_0_to_1(make, share):
    with pytest.raises(InputError, match=r"data\.max_dropped_share: is .* It is a share"):
        make(SFTData, [chat("q", "a")], max_dropped_share=share)


def test_a_share_that_would_do_nothing_is_refused(make):
    with pytest.raises(InputError, match=r"data\.max_dropped_share: does nothing with on_overflow: error"):
        make(SFTData, [chat("q", "a")], max_dropped_share=0.1, on_overflow="error")


# Training nothing ---------------------------------------------------------------------------------------------------


def weighted(*weights: float) -> dict:
    row = talk(*["ab"] * len(weights))
    for message, weight in zip(row["messages"][1::2], weights, strict=True):
        message["weight"] = weight
    return row


def test_weights_of_messages_reach_their_tokens(make):
    ((segment,),) = make(SFTData, [weighted(0.5, 0.0, 2.0)], template="tulu").documents[0]
    context = [0.0] * 25
    turns = [[*context, w, w, w] for w in (0.5, 0.0, 2.0)]
    assert segment.weights_L.tolist() == [*turns[0], 0.0, *turns[1], 0.0, *turns[2]]
    (batch,) = make(SFTData, [weighted(0.5, 0.0, 2.0), talk("ab")], template="tulu").train_dataloader()
    assert batch.denominator == 3 * (0.5 + 2.0) + 3


def test_only_the_last_turn_is_trained_if_so_asked(make):
    ((segment,),) = make(SFTData, [talk("ab", "c")], template="tulu", train="last").documents[0]
    assert segment.weights_L.tolist() == [0.0] * (28 + 1 + 25) + [1.0, 1.0]
    with pytest.raises(InputError, match=r"data\.train: is 'first'"):
        make(SFTData, [talk("ab")], train="first")


def test_a_step_whose_labels_are_all_masked_cannot_be(make, write):
    """A row that trains nothing is left out, so no step is made of such rows alone; and a source of nothing else stops."""
    rows = [weighted(0.0, 1e-50), talk("ab")]  # 1e-50 is 0 in fp32
    batches = list(make(SFTData, [*rows, *rows], examples_per_step=1).train_dataloader())
    assert [batch.denominator for batch in batches] == [3.0, 3.0]
    sources = [write([talk("ab")], "good"), write([weighted(0.0, 1e-50)] * 3, "masked")]
    with pytest.raises(InputError, match=r"source 'masked': every row was left out \(3 without a trained token\)"):
        SFTData(sources=sources, **SETTINGS).setup()


# Counts and repeats -------------------------------------------------------------------------------------------------


def test_a_count_that_cannot_be_had_says_what_there_is(write):
    source = replace(write([chat("q", "a")] * 3 + [chat("q", " ")] * 2), count=4)
    said = r"count is 4, and only 3 of its rows are usable \(2 with an empty message were left out\). Ask for at most 3"
    with pytest.raises(InputError, match=said):
        SFTData(sources=[source], **SETTINGS).setup()
    assert len(SFTData(sources=[replace(source, count=3)], **SETTINGS).documents) == 3
    assert len(SFTData(sources=[replace(source, count=None, cap=4)], **SETTINGS).documents) == 3


@pytest.mark.parametrize("module", [SFTData, PreferenceData, PromptData])
def test_a_row_that_is_repeated_is_one_row_for_each_time(write, module):
    row = {
        SFTData: lambda i: chat("q", f"a{i}"),
        PreferenceData: lambda i: pair("q", f"a{i}", "b"),
        PromptData: lambda i: prompt(f"q{i}"),
    }
    rows = [row[module](i) for i in range(4)]
    sources = [replace(write(rows, "often"), upsample=2.5), write(rows[:1], "once")]
    data = module(sources=sources, **{**SETTINGS, "examples_per_step": 11})
    data.setup()
    assert data.source_names == ("often", "once")
    assert [data.source_of(row) for row in range(11)] == ["often"] * 10 + ["once"]
    assert data.source_numbers.tolist() == [0] * 10 + [1]
    (batch,) = data.train_dataloader()
    assert sorted(batch.rows if module is not PromptData else [prompt.row for prompt in batch.prompts]) == list(
        range(11)
    )
    times = Counter(data.mixed.places[:10].tolist())
    assert sorted(times.values()) == [2, 2, 3, 3]
    assert (
        data.manifest()["sources"]["often"] | {"kept": 4, "used": 10, "repeated": 6}
        == data.manifest()["sources"]["often"]
    )
