"""Sources of all kinds through the data modules: what ends up in the mixture, and how faults in it are named."""

import re
from collections import Counter
from dataclasses import replace

import pytest

from tulu_lightning.assets.tiny import byte_tokenizer
from tulu_lightning.data.preference import PreferenceData
from tulu_lightning.data.prompts import PromptData
from tulu_lightning.data.sft import SFTData
from tulu_lightning.errors import InputError

TOKENIZER = byte_tokenizer()
SETTINGS = {"tokenizer": "tiny-random-llama", "template": "tulu", "max_tokens": 200, "examples_per_step": 4}

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
PROMPT = {"messages": [{"role": "user", "content": "q"}], "ground_truth": "1", "verifier": "last_number"}


def chat(answer, **more):
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}], **more}


def answers(*sources, **settings) -> list[str]:
    """What each row of the mixture teaches, in order."""
    data = SFTData(sources=list(sources), **{**SETTINGS, **settings})
    data.setup()
    taught = []
    for document in data.documents:
        (segment,) = document.segments
        ids = segment.ids_L[segment.weights_L > 0].tolist()
        assert ids[-1] == TOKENIZER.eos_token_id
        taught.append(TOKENIZER.decode(ids[:-1]))
    return taught


def test_upsampled_rows_come_as_often_as_asked_and_are_counted_to_their_source(write):
    small = replace(write([chat(f"s{i}") for i in range(4)], "small"), upsample=2.5)
    data = SFTData(sources=[write([chat("b")], "big"), small], **SETTINGS)
    data.setup()
    times = Counter(answers(*data.sources))
    assert times.pop("b") == 1
    assert sorted(times.values()) == [2, 2, 3, 3]
    assert Counter(data.source_of(row) for row in range(11)) == {"big": 1, "small": 10}


def test_exactly_count_usable_rows_are_drawn(write):
    rows = write([chat(f"a{i}" if i % 2 else "") for i in range(20)])
    drawn = answers(replace(rows, count=7))
    assert len(set(drawn)) == 7
    assert len(answers(replace(rows, cap=7))) == 7
    assert len(answers(replace(rows, cap=15))) == 10  # there are no more
    with pytest.raises(InputError, match=r"source 'rows': count is 11, and .*10 .*usable"):
        answers(replace(rows, count=11))


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_other_sources(write):
    drawn = replace(write([chat(f"a{i}") for i in range(30)], "drawn"), fraction=0.3)
    other = write([chat("other")], "other")
    alone = answers(drawn, seed=1)
    assert len(alone) == 9
    assert answers(other, drawn, seed=1) == ["other", *alone]
    assert answers(drawn, seed=2) != alone


def test_a_fault_is_named_by_the_row_of_the_file_also_among_matching_rows(write):
    rows = [chat("a", kind=str(i % 2)) for i in range(8)]
    rows[5]["messages"] = "none"
    source = replace(write(rows), match={"kind": "1"})
    with pytest.raises(InputError, match=r"rows.jsonl, row 6: messages is 'none'"):
        answers(source)
    assert len(answers(replace(source, match={"kind": "0"}))) == 4


def test_sources_of_several_formats_mix(write):
    sources = [
        replace(write([{"conversation": chat("m")["messages"]}], "m"), columns={"messages": "conversation"}),
        replace(write([{"instruction": "q", "input": "", "output": "a"}], "a"), read="alpaca"),
        replace(write([{"prompt": "q", "completion": "p"}], "p"), read="prompt_completion"),
        replace(
            write([{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "s"}]}], "s"),
            read="sharegpt",
        ),
    ]
    assert answers(*sources) == ["m", "a", "p", "s"]


def test_plain_text_has_no_template_and_is_trained_from_its_second_token_to_its_end(write):
    source = replace(write([{"text": "Once upon a <|user|>"}]), read="text")
    data = SFTData(sources=[source], **SETTINGS)
    data.setup()
    (segment,) = data.documents[0].segments
    text = TOKENIZER.encode("Once upon a <|user|>", add_special_tokens=False, split_special_tokens=True)
    assert segment.ids_L.tolist() == [*text, TOKENIZER.eos_token_id]
    assert segment.weights_L[1:].tolist() == [1.0] * len(text)


@pytest.mark.parametrize(
    ("module", "row", "said"),
    [
        (SFTData, chat("a"), "there is no format 'ultrafeedback' for SFTData. Known: alpaca, messages, "),
        (
            PreferenceData,
            PAIR,
            "there is no format 'alpaca' for PreferenceData. Known: messages, sharegpt, ultrafeedback.",
        ),
        (PreferenceData, PAIR, "there is no format 'sharegp'. Did you mean 'sharegpt'?"),
        (PromptData, PROMPT, "there is no format 'alpaca' for PromptData. Known: gsm8k, math, messages."),
        (PromptData, PROMPT, "there is no format 'gsmk'. Did you mean 'gsm8k'?"),
    ],
)
def test_a_format_that_a_data_module_does_not_have_is_refused_with_the_nearest(write, module, row, said):
    source = replace(write([row]), read=said.split("'")[1])
    with pytest.raises(InputError, match=f"^source 'rows': {re.escape(said)}"):
        module(sources=[source], **SETTINGS).setup()
