"""Many conversations at once, weights, and rows that are too long."""

import gc

import pytest
from chat_tokenizers import CONVERSATIONS, NASTY, byte_level, llama3, llama3_bytes, smollm2, turns
from transformers import ByT5Tokenizer

from tulu_lightning.assets.tiny import byte_tokenizer
from tulu_lightning.data import encoding
from tulu_lightning.data.chat import PLAIN, Encoded, chat_template, encode, encode_many, truncate

PAIRS = [
    (byte_tokenizer, "tulu"),
    (byte_tokenizer, "chatml"),
    (smollm2, "tulu"),
    (smollm2, "chatml"),
    (smollm2, "smollm2"),
    (llama3_bytes, "llama3"),
    (llama3, "llama3"),
    (llama3, "tulu"),
]


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[0].__name__}-{pair[1]}", scope="module")
def pair(request):
    make, name = request.param
    tokenizer = make()
    return tokenizer, chat_template(name, tokenizer)


def alone(tokenizer, template, messages):
    ids, mask = encode(tokenizer, template, messages)
    return ids, [float(trained) for trained in mask]


def test_many_at_once_are_the_same_as_each_alone(pair, monkeypatch):
    tokenizer, template = pair
    conversations = [*CONVERSATIONS, *NASTY, *CONVERSATIONS]
    expected = [alone(tokenizer, template, messages) for messages in conversations]
    for chunk in (encoding.CHUNK, 3, 1):
        monkeypatch.setattr(encoding, "CHUNK", chunk)
        assert [row[:2] for row in encode_many(tokenizer, template, conversations)] == expected
    assert encode_many(tokenizer, template, []) == []


def test_an_end_is_behind_the_end_token_of_each_assistant_turn(pair):
    tokenizer, template = pair
    (end,) = tokenizer.encode(template.end, add_special_tokens=False)
    for messages, row in zip(NASTY, encode_many(tokenizer, template, NASTY), strict=True):
        assert len(row.ends) == sum(message["role"] == "assistant" for message in messages)
        assert all(row.ids[at - 1] == end and row.weights[at - 1] == 1 for at in row.ends)
        # Behind each end token nothing is trained until the next answer.
        assert all(not row.weights[at] for at in row.ends if at < len(row.ids))


@pytest.mark.parametrize("special", [True, False])
def test_the_tokenizer_is_left_as_it_was(special):
    tokenizer = smollm2()
    template = chat_template("chatml", tokenizer)
    expected = encode(tokenizer, template, CONVERSATIONS[1])[0]
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = special
    backend.enable_truncation(5, stride=1, strategy="only_first", direction="left")
    backend.enable_padding(direction="left", pad_id=2, pad_token="<|im_end|>", length=9)
    before = backend.truncation, backend.padding
    assert encode_many(tokenizer, template, [CONVERSATIONS[1]])[0].ids == expected  # neither cut nor filled up
    assert (backend.truncation, backend.padding) == before
    assert backend.encode_special_tokens is special
    backend.no_truncation()
    backend.no_padding()


@pytest.mark.parametrize("collecting", [True, False])
def test_the_garbage_collector_is_left_as_it_was(collecting):
    tokenizer = byte_tokenizer()
    template = chat_template("tulu", tokenizer)
    was = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        encode_many(tokenizer, template, CONVERSATIONS)
        assert gc.isenabled() is collecting
        with pytest.raises(KeyError):
            encode_many(tokenizer, template, [[{"role": "user"}]])
        assert gc.isenabled() is collecting
    finally:
        (gc.enable if was else gc.disable)()


def test_plain_text_begins_with_the_bos_of_a_template_that_has_one():
    tokenizer = llama3_bytes()
    bos, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<|begin_of_text|>", "<|eot_id|>"))
    text, name = "Once", "<|begin_of_text|>"  # of which the second is text where a row has it
    (row,) = encode_many(tokenizer, chat_template("llama3", tokenizer), [[{"role": PLAIN, "content": text + name}]])
    assert row.ids == [bos, *tokenizer.encode(text + name, add_special_tokens=False, split_special_tokens=True), end]
    assert row.weights == [0.0] + [1.0] * (len(row.ids) - 1)
    assert truncate(row, 4).ids == [*row.ids[:3], end]


def test_a_tokenizer_that_is_not_in_rust_takes_the_long_way():
    tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    assert not tokenizer.is_fast
    template = chat_template("chatml", tokenizer)
    conversations = [turns("a <|im_end|> b", "c", "日本", "x"), *CONVERSATIONS]
    rows = encode_many(tokenizer, template, conversations)
    assert [row[:2] for row in rows] == [alone(tokenizer, template, messages) for messages in conversations]
    assert rows[0].ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 4  # one for each turn


# Weights --------------------------------------------------------------------------------------------------------

WEIGHED = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "ab", "weight": 0.5},
    {"role": "user", "content": "r"},
    {"role": "assistant", "content": "c", "weight": 0},
    {"role": "user", "content": "s"},
    {"role": "assistant", "content": "d"},
]


def trained(tokenizer, row) -> list[tuple[str, float]]:
    return [(tokenizer.decode(token), weight) for token, weight in zip(row.ids, row.weights, strict=True) if weight]


def test_a_messages_weight_is_that_of_its_words_and_its_end_token():
    tokenizer = byte_tokenizer()
    for name in ("tulu", "chatml"):
        (row,) = encode_many(tokenizer, chat_template(name, tokenizer), [WEIGHED])
        assert trained(tokenizer, row) == [("a", 0.5), ("b", 0.5), ("<|im_end|>", 0.5), ("d", 1.0), ("<|im_end|>", 1.0)]
        assert len(row.ends) == 3


def test_only_the_last_turn_is_trained_on_demand():
    tokenizer = byte_tokenizer()
    template = chat_template("tulu", tokenizer)
    conversations = [WEIGHED, turns("q", "a", "r", "b", "s"), turns("q")]
    rows = encode_many(tokenizer, template, conversations, train="last")
    assert [trained(tokenizer, row) for row in rows] == [
        [("d", 1.0), ("<|im_end|>", 1.0)],
        [("b", 1.0), ("<|im_end|>", 1.0)],
        [],
    ]
    assert [row.ids for row in rows] == [row.ids for row in encode_many(tokenizer, template, conversations)]


# Too long -------------------------------------------------------------------------------------------------------

# ids tell where tokens came from: 1x the first prompt, 2x its answer, 9 an end token, 3x and 4x the next turn, 7 what
# follows the last turn
LONG = Encoded(
    [10, 11, 12, 20, 21, 22, 9, 30, 31, 40, 9, 7],
    [0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0],
    (7, 11),
)


@pytest.mark.parametrize(
    ("max_tokens", "ids", "ends"),
    [
        (99, LONG.ids, (7, 11)),
        (12, LONG.ids, (7, 11)),
        (11, [10, 11, 12, 20, 21, 22, 9, 30, 31, 40, 9], (7, 11)),  # what follows the last turn goes first
        (10, [10, 11, 12, 20, 21, 22, 9], (7,)),  # then whole turns
        (7, [10, 11, 12, 20, 21, 22, 9], (7,)),
        (6, [10, 11, 12, 20, 21, 9], (6,)),  # then words of the first answer, never its end token
        (5, [10, 11, 12, 20, 9], (5,)),
    ],
)
def test_a_row_is_cut_to_end_in_an_end_token(max_tokens, ids, ends):
    cut = truncate(LONG, max_tokens)
    assert cut is not None
    assert (cut.ids, cut.ends) == (ids, ends)
    assert cut.weights == LONG.weights[: len(ids) - 1] + LONG.weights[len(ids) - 1 : len(ids)]
    assert len(cut.ids) <= max_tokens


@pytest.mark.parametrize("max_tokens", [4, 3, 1])
def test_a_prompt_that_leaves_no_room_for_a_word_and_its_end_cannot_be_cut(max_tokens):
    assert truncate(LONG, max_tokens) is None


def test_cutting_keeps_a_trained_turn():
    last_only = LONG._replace(weights=[0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0])
    assert truncate(last_only, 11) == Encoded(LONG.ids[:11], last_only.weights[:11], (7, 11))
    assert truncate(last_only, 10) is None  # its one word cannot be cut
    longer = Encoded([10, 20, 9, 30, 40, 41, 42, 9], [0, 0, 0, 0, 1, 1, 1, 1], (3, 8))
    assert truncate(longer, 7) == Encoded([10, 20, 9, 30, 40, 41, 9], [0, 0, 0, 0, 1, 1, 1], (3, 7))
    assert truncate(LONG._replace(weights=[0] * 12), 11) is None  # nothing is trained
    assert truncate(Encoded([1, 2, 3], [0, 0, 0], ()), 2) is None


def test_weights_are_cut_with_their_tokens():
    row = Encoded([10, 20, 21, 9], [0, 0.5, 0.5, 0.5], (4,))
    assert truncate(row, 3) == Encoded([10, 20, 9], [0, 0.5, 0.5], (3,))


@pytest.mark.parametrize("name", ["tulu", "chatml"])
def test_every_cut_of_a_real_row_ends_as_it_should(name):
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    template = chat_template(name, tokenizer)
    (row,) = encode_many(tokenizer, template, [turns("q", "abc", "r", "defg", "s", "h")])
    room = len(encode(tokenizer, template, turns("q"), generation_prompt=True)[0])
    for max_tokens in range(1, len(row.ids)):
        cut = truncate(row, max_tokens)
        assert (cut is None) == (max_tokens < room + 2)
        if cut is not None:
            assert len(cut.ids) == len(cut.weights) <= max_tokens
            assert cut.ids[-1] == tokenizer.eos_token_id
            assert cut.weights[-1] == 1
            assert cut.ids[:-1] == row.ids[: len(cut.ids) - 1]
            assert cut.ends[-1] == len(cut.ids)
