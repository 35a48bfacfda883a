"""The Llama 3 template, with the model's tokenizer where there is one and with a stand-in (others: `test_chat.py`)."""

import pytest
from chat_tokenizers import CONVERSATIONS, LLAMA3_SPECIALS, byte_level, llama3, llama3_bytes, turns

from tulu_lightning.data.chat import chat_template, encode, encode_answer, encode_many, stop_ids
from tulu_lightning.errors import InputError

META = (  # the template that Meta's tokenizer_config.json had at the release of Llama 3
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@pytest.fixture(params=[llama3_bytes, llama3], ids=["stand-in", "llama3.1"])
def tokenizer(request):
    return request.param()


def text_of(template, messages, generation_prompt=False):
    return "".join(piece.text for piece in template.render(messages, generation_prompt))


def test_llama3_renders_as_meta_says():
    template = chat_template("llama3", llama3_bytes())
    assert text_of(template, turns(" u1\n", "\ta1 ", system="s"), generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nu1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("messages", [*CONVERSATIONS, turns("  q ", "\n\n a \n"), turns("", "")])
def test_llama3_gives_the_ids_of_metas_own_template(tokenizer, messages, generation_prompt):
    for jinja in (META, chat_template("llama3", tokenizer).jinja):
        own = tokenizer.apply_chat_template(
            messages, chat_template=jinja, add_generation_prompt=generation_prompt, return_dict=False
        )
        ids, _ = encode(tokenizer, chat_template("llama3", tokenizer), messages, generation_prompt)
        assert ids == own


def test_the_llama3_package_has_the_template_that_we_compare_with():
    assert llama3().chat_template == META


def test_llama3_has_one_bos_with_a_tokenizer_that_adds_one_by_itself():
    tokenizer = llama3_bytes()
    bos = tokenizer.bos_token_id
    assert tokenizer("x")["input_ids"].count(bos) == 1  # it does add one
    template = chat_template("llama3", tokenizer)
    (row,) = encode_many(tokenizer, template, [turns("a", "b", "c", "d")])
    ids, _ = encode(tokenizer, template, turns("a", "b", "c"), generation_prompt=True)
    for found in (row.ids, ids):
        assert [at for at, token in enumerate(found) if token == bos] == [0]
    assert bos not in encode_answer(tokenizer, template, "b")
    assert bos not in encode(tokenizer, chat_template("tulu", tokenizer), turns("a", "b"))[0]  # wants none, gets none


def test_llama3_trains_the_words_and_the_end_of_turn():
    tokenizer = llama3_bytes()
    (row,) = encode_many(tokenizer, chat_template("llama3", tokenizer), [turns("q", " ab ", "r", "c")])
    trained = [tokenizer.decode(token) for token, weight in zip(row.ids, row.weights, strict=True) if weight]
    assert trained == ["a", "b", "<|eot_id|>", "c", "<|eot_id|>"]
    assert [row.ids[end - 1] for end in row.ends] == [tokenizer.eos_token_id] * 2


def test_llama3_needs_its_own_tokens():
    with pytest.raises(InputError, match=r"its token <\|.*\|> is not in the tokenizer's vocabulary"):
        chat_template("llama3", byte_level(eos_token="<|end_of_text|>"))


def test_llama3_stops_on_every_id_that_the_generation_config_names():
    tokenizer = llama3()
    template = chat_template("llama3", tokenizer)
    assert stop_ids(tokenizer, template) == (128009,)
    assert stop_ids(tokenizer, template, (128001, 128008, 128009)) == (128001, 128008, 128009)  # Instruct's own list


def test_llama3_stops_on_the_end_of_turn_and_on_a_base_models_eos():
    tokenizer = byte_level(LLAMA3_SPECIALS, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
    assert stop_ids(tokenizer, chat_template("llama3", tokenizer)) == (257, 260)
    assert stop_ids(tokenizer, chat_template("llama3", tokenizer), (3, 257)) == (3, 257, 260)
