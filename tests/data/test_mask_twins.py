"""Ids and masks beside those of transformers and of TRL's SFTTrainer, on the cases where these are right.

Where they differ, the name of the test says what theirs does.
"""

from importlib import util
from pathlib import Path

import pytest
from chat_tokenizers import CONVERSATIONS, llama3, llama3_bytes, smollm2, turns

from tulu_lightning.assets.models import resolve_model
from tulu_lightning.assets.tiny import byte_tokenizer
from tulu_lightning.data.chat import chat_template, encode_many, stop_ids
from tulu_lightning.data.doctor import examine, probes

TULU = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|assistant|>\n"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% else %}{{ '<|' + message.role + '|>\n' + message.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def trl_template(name: str) -> str:
    """One of the templates that TRL puts in place of a model's own when it trains answers only."""
    found = util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("TRL is not installed")
    return Path(found.origin).with_name("chat_templates").joinpath(f"{name}_training.jinja").read_text()


def theirs(tokenizer, jinja, messages) -> tuple[list[int], list[float]]:
    made = tokenizer.apply_chat_template(
        messages, chat_template=jinja, return_dict=True, return_assistant_tokens_mask=True
    )
    return made["input_ids"], [float(trained) for trained in made["assistant_masks"]]


def ours(tokenizer, name, messages, **settings) -> tuple[list[int], list[float]]:
    (row,) = encode_many(tokenizer, chat_template(name, tokenizer), [messages], **settings)
    return row.ids, row.weights


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("make", [byte_tokenizer, smollm2])
@pytest.mark.parametrize(("name", "jinja"), [("tulu", TULU), ("chatml", CHATML)])
def test_tulu_and_chatml_are_those_of_transformers_with_spans(make, name, jinja, messages):
    tokenizer = make()
    assert ours(tokenizer, name, messages) == theirs(tokenizer, jinja, messages)


@pytest.mark.parametrize("messages", [*CONVERSATIONS, turns(" q ", "\n a \n")])
@pytest.mark.parametrize("make", [llama3_bytes, llama3])
def test_llama3_is_trls_training_template(make, messages):
    tokenizer = make()
    assert ours(tokenizer, "llama3", messages) == theirs(tokenizer, trl_template("llama3"), messages)


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize(
    ("make", "name"),
    [(byte_tokenizer, "qwen2_5"), (smollm2, "qwen2_5"), (byte_tokenizer, "qwen3"), (smollm2, "qwen3")],
)
def test_a_models_own_template_gives_the_mask_that_transformers_gives(monkeypatch, make, name, messages):
    tokenizer = make()
    monkeypatch.setattr(tokenizer, "chat_template", trl_template(name))
    assert ours(tokenizer, "model", messages) == theirs(tokenizer, tokenizer.chat_template, messages)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_llamas_own_template_gives_the_mask_that_transformers_gives(monkeypatch, messages):
    for tokenizer in (llama3_bytes(), llama3()):
        monkeypatch.setattr(tokenizer, "chat_template", trl_template("llama3"))
        assert ours(tokenizer, "model", messages) == theirs(tokenizer, tokenizer.chat_template, messages)
        assert ours(tokenizer, "model", messages) == ours(tokenizer, "llama3", messages)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3"])
def test_the_doctor_finds_trls_training_templates_healthy(name):
    tokenizer = llama3_bytes() if name == "llama3" else byte_tokenizer()
    tokenizer.chat_template = trl_template(name)
    template = chat_template("model", tokenizer)
    assert examine(tokenizer, template, probes(tokenizer), stop_ids(tokenizer, template)) == []


def test_the_doctor_knows_that_an_answers_first_newlines_may_join_those_before_it(monkeypatch):
    tokenizer = smollm2()  # Qwen's span begins with the newline of the header
    monkeypatch.setattr(tokenizer, "chat_template", trl_template("qwen2_5"))
    template = chat_template("model", tokenizer)
    rows = [("row 1", turns("q", "\n\nok"))]
    assert examine(tokenizer, template, rows, stop_ids(tokenizer, template)) == []


# Where they differ ----------------------------------------------------------------------------------------------


def test_trls_qwen_template_also_trains_the_newline_around_an_answer():
    tokenizer = byte_tokenizer()
    messages = turns("q", "a", system="s")
    ids, mask = theirs(tokenizer, trl_template("qwen2_5"), messages)
    mine, weights = ours(tokenizer, "chatml", messages)
    assert ids == mine
    more = [at for at, pair in enumerate(zip(mask, weights, strict=True)) if pair[0] != pair[1]]
    assert [tokenizer.decode(ids[at]) for at in more] == ["\n", "\n"]  # of the header, and behind the end token
    assert all(mask[at] > weights[at] for at in more)


def test_transformers_lets_a_token_reach_over_the_border_where_an_answer_starts_with_newlines():
    tokenizer = smollm2()
    messages = turns("q", "\n\nok")
    ids, mask = theirs(tokenizer, CHATML, messages)
    mine, _ = ours(tokenizer, "chatml", messages)
    assert tokenizer.decode(ids) == tokenizer.decode(mine)
    (first, *_) = [token for token, trained in zip(ids, mask, strict=True) if trained]
    assert tokenizer.decode(first) == "\n\n"  # half of it is the prompt's, where no sampler can have it
    prompt = tokenizer.apply_chat_template(messages[:1], chat_template=CHATML, add_generation_prompt=True)["input_ids"]
    assert mine[: len(prompt)] == prompt
    assert ids[: len(prompt)] != prompt


def test_transformers_takes_special_tokens_out_of_a_users_text():
    tokenizer = byte_tokenizer()
    messages = turns("x<|im_end|>y", "a")
    ids, _ = theirs(tokenizer, CHATML, messages)
    mine, _ = ours(tokenizer, "chatml", messages)
    assert (ids.count(tokenizer.eos_token_id), mine.count(tokenizer.eos_token_id)) == (3, 2)  # two turns end


# TRL's trainer, as its users run it -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl_rows(tmp_path_factory):
    """What SFTTrainer makes of rows: ids and mask, from its labels."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    def prepare(tokenizer, rows, **settings):
        settings = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, **settings}
        trainer = trl.SFTTrainer(
            model=str(resolve_model("tiny-random-llama")),
            processing_class=tokenizer,
            args=trl.SFTConfig(output_dir=str(tmp_path_factory.mktemp("trl")), **settings),
            train_dataset=datasets.Dataset.from_list(rows),
        )
        made = list(trainer.train_dataset)
        return [(row["input_ids"], [float(label != -100) for label in row["labels"]]) for row in made]

    return prepare


def test_trl_prepares_the_same_rows_from_answers_only(trl_rows):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TULU
    found = trl_rows(tokenizer, [{"messages": messages} for messages in CONVERSATIONS], assistant_only_loss=True)
    assert found == [ours(tokenizer, "tulu", messages) for messages in CONVERSATIONS]
    assert found == [ours(tokenizer, "model", messages) for messages in CONVERSATIONS]


def test_trl_prepares_the_same_rows_from_prompt_and_completion_as_the_last_turn_alone(trl_rows):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TULU
    conversations = [messages for messages in CONVERSATIONS if messages[-1]["role"] == "assistant"]
    assert {len(messages) for messages in conversations} == {2, 4}
    rows = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in conversations]
    assert trl_rows(tokenizer, rows) == [ours(tokenizer, "tulu", m, train="last") for m in conversations]


def test_trl_also_trains_the_newline_that_chatml_puts_behind_a_completion(trl_rows):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    (pair,) = trl_rows(tokenizer, [{"prompt": turns("q"), "completion": turns("q", "a")[1:]}])
    ids, weights = ours(tokenizer, "chatml", turns("q", "a"))
    assert pair == (ids, [*weights[:-1], 1.0])
    assert tokenizer.decode(ids[-1]) == "\n"
