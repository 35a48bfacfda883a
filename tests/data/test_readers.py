import pytest

from tulu_lightning.data.readers import read_chat
from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError

SOURCE = Source("s", path="rows.jsonl")
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def fault(read, row, *more) -> str:
    with pytest.raises(InputError) as caught:
        read(SOURCE, 17, row, *more)
    assert caught.value.where == "rows.jsonl, row 17"
    assert caught.value.remedy
    return caught.value.what


def test_a_row_made_by_a_function_is_named_by_its_source():
    with pytest.raises(InputError, match="source 'sums', row 2"):
        read_chat(Source("sums", rows="a.b"), 2, {})


def test_a_good_chat_row_keeps_roles_and_contents_only():
    row = {"messages": [{**USER, "id": 1}, ANSWER], "source": "x"}
    assert read_chat(SOURCE, 1, row) == [USER, ANSWER]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"text": "a"}, "the row has no field 'messages' (it has text)"),
        ({"messages": []}, "messages is [], not a list of messages"),
        ({"messages": "hi"}, "messages is 'hi', not a list of messages"),
        ({"messages": ["hi"]}, "messages[0] is 'hi'"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1] is {'role': 'assistant'}"),
        (
            {"messages": [{"role": "asistant", "content": ""}]},
            "messages[0] has the role 'asistant', which does not exist",
        ),
        ({"messages": [{"role": None, "content": ""}]}, "messages[0] has the role None, which does not exist"),
        ({"messages": [USER, {**ANSWER, "content": 68}]}, "content of messages[1] is 68, not text"),
        ({"messages": [USER, {**ANSWER, "content": None}]}, "content of messages[1] is None, not text"),
        ({"messages": [USER]}, "messages has no assistant turn to learn from"),
        ({"messages": [USER, {**ANSWER, "weight": -0.5}]}, "weight of messages[1] is -0.5"),
        ({"messages": [USER, {**ANSWER, "weight": "1"}]}, "weight of messages[1] is '1'"),
        ({"messages": [USER, {**ANSWER, "weight": True}]}, "weight of messages[1] is True"),
        ({"messages": [USER, {**ANSWER, "weight": float("nan")}]}, "weight of messages[1] is nan"),
        ({"messages": [USER, {**ANSWER, "loss_weight": float("inf")}]}, "loss_weight of messages[1] is inf"),
        ({"messages": [USER, {**ANSWER, "weight": 1e39}]}, "weight of messages[1] is 1e+39"),  # infinite in fp32
        ({"messages": [USER, {**ANSWER, "train": 0}]}, "train of messages[1] is 0"),
        (
            {"messages": [USER, {**ANSWER, "train": False, "weight": 2}]},
            "messages[1] has weights that clash: {'weight': 2, 'train': False}",
        ),
        (
            {"messages": [USER, {**ANSWER, "loss_weight": 0.5, "weight": 2}]},
            "messages[1] has weights that clash: {'weight': 2, 'loss_weight': 0.5}",
        ),
        (
            {"messages": [{**USER, "weight": 1}, ANSWER]},
            "messages[0] has the weight 1, and only assistant turns are trained",
        ),
        ({"messages": [USER, {**ANSWER, "content": []}]}, "content of messages[1] is [], not text"),
        (
            {"messages": [USER, {**ANSWER, "content": [{"type": "image", "image": "x"}]}]},
            "content of messages[1] has the part {'type': 'image', 'image': 'x'}",
        ),
        (
            {"messages": [USER, {**ANSWER, "content": [{"type": "text"}]}]},
            "a part of content of messages[1] is None, not text",
        ),
        (
            {"messages": [USER, {**ANSWER, "content": "ab\ud83d"}]},
            "content of messages[1] has half of a surrogate pair at character 2, which no tokenizer can read",
        ),
    ],
)
def test_a_bad_chat_row(row, what):
    assert fault(read_chat, row) == what


@pytest.mark.parametrize(
    ("given", "weight"),
    [
        ({"weight": 0.5}, {"weight": 0.5}),
        ({"loss_weight": 1.0}, {"weight": 1.0}),  # as in llamafactory's v1_sft_demo.jsonl
        ({"weight": 2, "loss_weight": 2.0}, {"weight": 2.0}),
        ({"train": False}, {"weight": 0.0}),
        ({"train": False, "weight": 0}, {"weight": 0.0}),
        ({"train": True}, {}),
        ({"train": None, "weight": None}, {}),  # a column that other rows use
    ],
)
def test_an_assistants_message_may_have_a_weight(given, weight):
    user = {**USER, "loss_weight": 0.0, "train": False}  # says what is so anyway
    assert read_chat(SOURCE, 1, {"messages": [user, {**ANSWER, **given}]}) == [USER, {**ANSWER, **weight}]


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]
    assert read_chat(SOURCE, 1, {"messages": [USER, {**ANSWER, "content": parts}]})[1]["content"] == "ab"


def test_a_misspelt_role_is_offered_its_nearest():
    with pytest.raises(InputError, match="Did you mean 'assistant'"):
        read_chat(SOURCE, 1, {"messages": [{"role": "asistant", "content": ""}]})


def test_long_values_are_shortened_in_messages():
    assert fault(read_chat, {"messages": "x" * 1000}) == f"messages is '{'x' * 56}..., not a list of messages"
