"""Rows of every format come out as the messages that they mean, or are refused by name."""

import json
import tarfile
from pathlib import Path

import pytest

from tulu_lightning.assets.cache import cache_dir
from tulu_lightning.assets.rows import ARCHIVE, alpaca_rows
from tulu_lightning.data.formats import to_messages
from tulu_lightning.data.intake import LeftOut
from tulu_lightning.data.sources import Source, load
from tulu_lightning.errors import InputError


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def read(how, row):
    return to_messages(Source("s", path="rows.jsonl", read=how), 17, row)


def test_messages_are_read_as_they_are():
    messages = [turn("system", "s"), turn("user", "q"), turn("assistant", "a")]
    assert read("messages", {"messages": messages, "source": "x"}) == messages


def test_sharegpt_turns_become_messages():
    turns = [("human", "q"), ("gpt", "a"), ("user", "r"), ("ChatGPT", "b"), ("system", "s"), ("assistant", "c")]
    row = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    roles = ["user", "assistant", "user", "assistant", "system", "assistant"]
    expected = [turn(role, text) for role, (_, text) in zip(roles, turns, strict=True)]
    assert read("sharegpt", row) == expected
    assert read("sharegpt", {**row, "system": "be brief"}) == [turn("system", "be brief"), *expected]
    assert read("sharegpt", {**row, "system": ""}) == expected
    row["conversations"][1]["weight"] = 0
    assert read("sharegpt", row)[1] == turn("assistant", "a", weight=0.0)


def test_alpaca_fields_become_a_question_and_an_answer():
    row = {"instruction": "add", "input": "", "output": "2"}
    assert read("alpaca", row) == [turn("user", "add"), turn("assistant", "2")]
    assert read("alpaca", {"instruction": "add", "output": "2"}) == [turn("user", "add"), turn("assistant", "2")]
    more = {"input": "1 + 1", "system": "s", "history": [["hi", "hello"]]}
    assert read("alpaca", {**row, **more}) == [
        turn("system", "s"),
        turn("user", "hi"),
        turn("assistant", "hello"),
        turn("user", "add\n\n1 + 1"),
        turn("assistant", "2"),
    ]


def test_prompt_and_completion_may_be_text_or_messages():
    expected = [turn("user", "q"), turn("assistant", "a")]
    for prompt in ("q", [turn("user", "q")]):
        for completion in ("a", [turn("assistant", "a")]):
            assert read("prompt_completion", {"prompt": prompt, "completion": completion}) == expected


def test_what_the_assistant_says_in_a_prompt_is_context_only():
    prompt = [turn("user", "q"), turn("assistant", "a"), turn("user", "r")]
    messages = read("prompt_completion", {"prompt": prompt, "completion": "b"})
    assert messages == [prompt[0], turn("assistant", "a", weight=0.0), prompt[2], turn("assistant", "b")]


def test_plain_text_is_one_message_of_its_own_role():
    assert read("text", {"text": "Once upon"}) == [turn("text", "Once upon")]


BAD = [
    ("messages", {"messages": [turn("tool", "x")]}, "messages[0] has the role 'tool', which does not exist"),
    ("messages", {"messages": [turn("user", [{"type": "image"}])]}, "content of messages[0] has the part {'type': 'image'}"),
    ("sharegpt", {"text": "x"}, "the row has no field 'conversations' (it has text)"),
    ("sharegpt", {"conversations": []}, "conversations is [], not a list of turns"),
    ("sharegpt", {"conversations": [turn("user", "q")]}, "conversations[0] is {'role': 'user', 'content': 'q'}"),
    ("sharegpt", {"conversations": [{"from": "observation", "value": "x"}]}, "conversations[0] is from 'observation', which does not exist"),
    ("sharegpt", {"conversations": [{"from": "human", "value": 5}]}, "value of conversations[0] is 5, not text"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "q"}]}, "messages has no assistant turn to learn from"),
    ("alpaca", {"instruction": "q"}, "the row has no field 'output' (it has instruction)"),
    ("alpaca", {"instruction": 5, "output": "a"}, "instruction is 5, not text"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["x"]]}, "history is [['x']]"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["x", None]]}, "a part of history is None, not text"),
    ("prompt_completion", {"prompt": "q"}, "the row has no field 'completion' (it has prompt)"),
    ("prompt_completion", {"prompt": 5, "completion": "a"}, "prompt is 5, not a list of messages"),
    ("prompt_completion", {"prompt": "q", "completion": [turn("user", "a")]}, "completion has a message of the user"),
    ("text", {"txt": "x"}, "the row has no field 'text' (it has txt)"),
    ("text", {"text": ["x"]}, "text is ['x'], not text"),
]  # fmt: skip


@pytest.mark.parametrize(("how", "row", "what"), BAD)
def test_a_row_that_does_not_fit_its_format_is_named(how, row, what):
    with pytest.raises(InputError) as caught:
        read(how, row)
    assert (caught.value.where, caught.value.what) == ("rows.jsonl, row 17", what)
    assert caught.value.remedy


# A reader of one's own ----------------------------------------------------------------------------------------------


@pytest.fixture
def my_readers(tmp_path, monkeypatch):
    """A module of the user's."""
    (tmp_path / "my_readers.py").write_text(
        "def odd(row):\n"
        "    if row['n'] % 2 == 0:\n"
        "        return None\n"
        "    return {'messages': [{'role': 'assistant', 'content': str(row['n'])}]}\n"
        "def listing(row):\n"
        "    return [row]\n"
        "def nothing(row):\n"
        "    return {'text': 'x'}\n"
        "def parts(row):\n"
        "    return {'messages': [{'role': m['role'], 'content': m['content'][0]['value'], 'weight': m['loss_weight']}\n"
        "                         for m in row['messages']]}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_a_reader_of_ones_own_gives_messages_or_leaves_the_row_out(my_readers):
    assert read("my_readers.odd", {"n": 3}) == [turn("assistant", "3")]
    with pytest.raises(LeftOut, match="by its reader"):
        read("my_readers.odd", {"n": 4})


@pytest.mark.parametrize(
    ("reader", "what"),
    [
        ("odd", "my_readers.odd fails on it (KeyError: 'n')"),
        ("listing", "my_readers.listing returned a list"),
        ("nothing", "the row has no field 'messages' (it has text)"),
    ],
)
def test_what_a_reader_of_ones_own_does_wrong_is_said_with_the_row(my_readers, reader, what):
    with pytest.raises(InputError) as caught:
        read(f"my_readers.{reader}", {"x": 1})
    assert (caught.value.where, caught.value.what) == ("rows.jsonl, row 17", what)


# Real sets ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """`real(name)` is a file of the package with chat rows, unpacked."""
    archive = cache_dir() / "packages" / ARCHIVE
    if not archive.is_file():
        pytest.skip(f"{archive} is not there")
    folder = tmp_path_factory.mktemp("real")

    def unpack(name):
        with tarfile.open(archive) as tar:
            member = tar.extractfile(f"llamafactory-0.9.5/data/{name}")
            assert member is not None
            (folder / name).write_bytes(member.read())
        return str(folder / name)

    return unpack


def test_a_real_alpaca_set_reads_as_our_own_reader_reads_it(real):
    source = Source("alpaca", path=real("alpaca_en_demo.json"), read="alpaca")
    rows = load(source)
    assert len(rows) == 999
    read = [to_messages(source, number, row) for number, row in enumerate(rows, start=1)]
    twin = [row["messages"] for row in alpaca_rows(410)]  # those of at most 400 characters
    assert all(messages in read for messages in twin)


def test_a_real_sharegpt_set_is_read_but_for_its_tool_calls(real):
    source = Source("glaive", path=real("glaive_toolcall_en_demo.json"), read="sharegpt")
    numbered = list(enumerate(load(source), start=1))
    plain = [(n, row) for n, row in numbered if {turn["from"] for turn in row["conversations"]} <= {"human", "gpt"}]
    assert (len(plain), len(numbered)) == (147, 300)  # counted in the file
    for number, row in plain:
        messages = to_messages(source, number, row)
        assert [m["content"] for m in messages] == [turn["value"] for turn in row["conversations"]]
    number, row = next(pair for pair in numbered if pair not in plain)
    with pytest.raises(InputError, match=r"is from 'function_call', which does not exist\. .*reader of your own"):
        to_messages(source, number, row)


def test_a_real_set_with_parts_and_weights_is_read_as_it_is_and_by_a_reader_of_ones_own(real, my_readers):
    path = real("v1_sft_demo.jsonl")
    first = json.loads(Path(path).read_text().split("\n")[0])["messages"]
    for how in ("messages", "my_readers.parts"):
        source = Source("v1", path=path, read=how)
        read = [to_messages(source, number, row) for number, row in enumerate(load(source), start=1)]
        assert sum(map(len, read)) == 1000
        assert [m["content"] for m in read[0]] == [m["content"][0]["value"] for m in first]
        assert {(m["role"], m.get("weight")) for messages in read for m in messages} == {
            ("user", None),
            ("assistant", 1.0),
        }
