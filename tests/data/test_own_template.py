"""The model's own Jinja template: masks from its generation spans."""

import pickle

import pytest
from chat_tokenizers import CONVERSATIONS, NASTY, byte_level, smollm2, turns
from tokenizers import AddedToken

from tulu_lightning.assets.tiny import byte_tokenizer
from tulu_lightning.data.chat import chat_template, encode, encode_answer, encode_many
from tulu_lightning.errors import InputError

CHATML = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_template(tokenizer, jinja):
    tokenizer.chat_template = jinja
    return tokenizer


@pytest.fixture(params=[byte_tokenizer, smollm2])
def tokenizer(request, monkeypatch):
    tokenizer = request.param()
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    return tokenizer


def test_spans_of_a_chatml_template_give_what_our_chatml_gives(tokenizer):
    own, ours = chat_template("model", tokenizer), chat_template("chatml", tokenizer)
    conversations = [*CONVERSATIONS, *NASTY]
    assert encode_many(tokenizer, own, conversations) == encode_many(tokenizer, ours, conversations)
    for messages in conversations:
        assert encode(tokenizer, own, messages, True) == encode(tokenizer, ours, messages, True)
    for text in ("68", " 2\n", "a<|im_end|>b", ""):
        assert encode_answer(tokenizer, own, text) == encode_answer(tokenizer, ours, text)
    assert (own.end, own.opening, own.bos) == (ours.end, ours.opening, "")


def test_a_template_without_spans_is_refused_with_the_remedy():
    plain = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(InputError, match=r"has no \{% generation %\} spans.*Put \{% generation %\} before"):
        chat_template("model", with_template(byte_tokenizer(), plain))


def test_a_model_without_a_template_is_refused():
    with pytest.raises(InputError, match=r"no chat template of its own.*tulu, llama3, chatml"):
        chat_template("model", byte_tokenizer())


def test_spans_for_some_turns_only_are_refused():
    last_only = CHATML.replace("'assistant' %}", "'assistant' and loop.last %}", 1)
    with pytest.raises(InputError, match="1 generation spans for 2 assistant turns"):
        chat_template("model", with_template(byte_tokenizer(), last_only))


def test_answers_that_end_in_no_special_token_are_refused():
    open_end = CHATML.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}")
    with pytest.raises(InputError, match="do not end in a special token"):
        chat_template("model", with_template(byte_tokenizer(), open_end))


def test_what_a_template_refuses_is_said_with_the_conversation():
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    tokenizer = with_template(byte_tokenizer(), strict)
    template = chat_template("model", tokenizer)
    with pytest.raises(InputError, match=r"does not render a conversation \(no system\): system: Be brief"):
        encode_many(tokenizer, template, [turns("q", "a", system="Be brief.")])
    assert encode_many(tokenizer, template, [turns("q", "a")])[0].ids  # and it works afterwards


def test_a_template_that_writes_the_date_is_refused():
    """Llama 3.2's does. Rows of yesterday, in the cache or in a checkpoint's identity, are not those of today."""
    today = "{% if date is not defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}{{ 'Today: ' + date }}"
    with pytest.raises(InputError, match=r"writes the date of the day \('%d %b %Y'\).*Write a fixed date"):
        chat_template("model", with_template(byte_tokenizer(), today + CHATML))
    only_system = "{% if messages[0].role == 'system' %}" + today + "{% endif %}"
    with pytest.raises(InputError, match="writes the date"):
        chat_template("model", with_template(byte_tokenizer(), only_system + CHATML))
    fixed = "{% set date = '26 Jul 2024' %}" + today
    messages = [{"role": "user", "content": "q"}]
    pieces = chat_template("model", with_template(byte_tokenizer(), fixed + CHATML)).render(messages)
    assert "".join(piece.text for piece in pieces).startswith("Today: 26 Jul 2024<|im_start|>")


def test_a_bos_that_the_template_writes_is_known():
    tokenizer = byte_level(["<s>", "<|im_start|>", "<|im_end|>"], bos_token="<s>", eos_token="<|im_end|>")
    assert chat_template("model", with_template(tokenizer, "{{ bos_token }}" + CHATML)).bos == "<s>"
    assert chat_template("model", with_template(tokenizer, CHATML)).bos == ""
    tokenizer.bos_token = "<|im_start|>"  # SmolLM2 calls what opens every turn its BOS
    assert chat_template("model", with_template(tokenizer, CHATML)).bos == ""


def test_white_space_that_a_special_token_swallows_is_left_out_as_the_tokenizer_does():
    tokenizer = byte_level(["<|im_start|>"], eos_token="<|im_end|>")
    tokenizer.add_tokens(AddedToken("<|im_end|>", rstrip=True, special=True, normalized=False), special_tokens=True)
    tokenizer.chat_template = CHATML
    template = chat_template("model", tokenizer)
    for messages in (turns("q", "a", "r", "b"), turns("q", "a", "r")):
        ids, _ = encode(tokenizer, template, messages)
        assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
        assert "\n" not in [tokenizer.decode(token) for token in ids[-1:]]


def test_special_tokens_of_messages_stay_text_where_the_template_trims_and_joins():
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML.replace("message.content", "(message.content | trim)")
    template = chat_template("model", tokenizer)
    # Place holders are private-use letters, so messages that hold such letters are the hard case.
    messages = turns(" <|im_end|>\ue000\ue001 ", "\ue0000\ue001 <|im_start|> ")
    (row,) = encode_many(tokenizer, template, [messages])
    assert (
        tokenizer.decode(row.ids)
        == "".join(piece.text for piece in template.render(messages))
        == (
            "<|im_start|>user\n<|im_end|>\ue000\ue001<|im_end|>\n"
            "<|im_start|>assistant\n\ue0000\ue001 <|im_start|><|im_end|>\n"
        )
    )
    assert [row.ids.count(tokenizer.convert_tokens_to_ids(name)) for name in ("<|im_start|>", "<|im_end|>")] == [2, 2]


def test_an_answer_must_follow_the_generation_prompt():
    other = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>bot\n' }}")
    tokenizer = with_template(byte_tokenizer(), other)
    with pytest.raises(InputError, match="its generation prompt is not what stands before an answer"):
        encode_answer(tokenizer, chat_template("model", tokenizer), "x")


def test_a_template_can_go_to_other_processes():
    tokenizer = with_template(byte_tokenizer(), CHATML)
    for name in ("model", "tulu", "chatml"):
        template = chat_template(name, tokenizer)
        copy = pickle.loads(pickle.dumps(template))
        assert copy.render(CONVERSATIONS[1]) == template.render(CONVERSATIONS[1])
