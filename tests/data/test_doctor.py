"""The template doctor: healthy templates pass, and each rule catches a template that is broken just so."""

from dataclasses import replace

import pytest
from chat_tokenizers import CONVERSATIONS, NASTY, byte_level, llama3, llama3_bytes, smollm2, turns
from tokenizers import normalizers

from tulu_lightning.assets.tiny import byte_tokenizer
from tulu_lightning.data import doctor
from tulu_lightning.data.chat import Encoded, Piece, chat_template, stop_ids
from tulu_lightning.data.doctor import RULES, Finding, examine, probes, stop_on
from tulu_lightning.data.sft import SFTData
from tulu_lightning.data.templates import TurnTemplate
from tulu_lightning.errors import InputError

HEALTHY = [
    (byte_tokenizer, "tulu"),
    (byte_tokenizer, "chatml"),
    (smollm2, "tulu"),
    (smollm2, "smollm2"),
    (smollm2, "chatml"),
    (llama3_bytes, "llama3"),
    (llama3_bytes, "tulu"),
    (llama3, "llama3"),
    (llama3, "tulu"),
]


def rows_of(conversations):
    return [(f"row {number}", messages) for number, messages in enumerate(conversations, start=1)]


def rules(tokenizer, template, stops=None, rows=None, **settings) -> set[str]:
    stops = stop_ids(tokenizer, template) if stops is None else stops
    found = examine(tokenizer, template, list(probes(tokenizer)) if rows is None else rows, stops, **settings)
    assert all(finding.rule in RULES for finding in found)
    return {finding.rule for finding in found}


@pytest.mark.parametrize(("make", "name"), HEALTHY)
def test_a_healthy_template_passes_on_probes_and_on_nasty_rows(make, name):
    tokenizer = make()
    template = chat_template(name, tokenizer)
    rows = [*probes(tokenizer), *rows_of([*CONVERSATIONS, *NASTY])]
    assert examine(tokenizer, template, rows, stop_ids(tokenizer, template)) == []


def test_weights_are_healthy_where_the_rows_say_so():
    tokenizer = byte_tokenizer()
    messages = turns("q", "not trained", "r", "half", "s", "whole")
    messages[1]["weight"], messages[3]["weight"] = 0.0, 0.5
    assert rules(tokenizer, chat_template("chatml", tokenizer), rows=[("row 1", messages)]) == set()


# Broken on purpose: each template is right but for one thing --------------------------------------------------------


def broken(change):
    """ChatML with the pieces of a turn changed by `change(message, pieces, last)`."""
    good = chat_template("chatml", byte_tokenizer())
    assert isinstance(good, TurnTemplate)
    turn = good.turn
    return replace(good, turn=lambda message, end, last: change(message, list(turn(message, end, last)), last))


def no_end(message, pieces, last):
    if message["role"] == "assistant":
        del pieces[3]
    return pieces


def text_for_an_end(message, pieces, last):
    if message["role"] == "assistant":
        pieces[3] = Piece("</s>", trained=True, ends=True)
    return pieces


def untrained_end(message, pieces, last):
    pieces[3] = pieces[3]._replace(trained=False)
    return pieces


def answer_without_its_first_word(message, pieces, last):
    if message["role"] == "assistant":
        first, *_ = pieces[2].text.split(" ")
        pieces[2:3] = [Piece(first), Piece(pieces[2].text[len(first) :], trained=True)]
    return pieces


def trained_user(message, pieces, last):
    pieces[2] = pieces[2]._replace(trained=message["role"] != "system")
    return pieces


def trained_system(message, pieces, last):
    pieces[2] = pieces[2]._replace(trained=message["role"] != "user")
    return pieces


def trained_user_to_answer(message, pieces, last):
    """From the user's words to the end of the answer all is trained, in one piece."""
    if message["role"] == "user":
        return [*pieces[:2], *(piece._replace(trained=True) for piece in pieces[2:])]
    if message["role"] == "assistant":
        return [piece._replace(trained=True) for piece in pieces[:4]] + pieces[4:]
    return pieces


def trained_header(message, pieces, last):
    if message["role"] == "assistant":
        pieces[1] = pieces[1]._replace(trained=True)
    return pieces


def mark_on_earlier_answers(message, pieces, last):
    return [Piece("... "), *pieces] if message["role"] == "assistant" and not last else pieces


def another_opening(message, pieces, last):
    if message["role"] == "assistant":
        pieces[1] = Piece("bot\n")
    return pieces


def content_as_control(message, pieces, last):
    pieces[2] = pieces[2]._replace(control=message["role"] == "user")
    return pieces


def lost_system(message, pieces, last):
    return [] if message["role"] == "system" else pieces


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (no_end, "end"),
        (text_for_an_end, "end"),
        (untrained_end, "end-trained"),
        (answer_without_its_first_word, "answer"),
        (trained_user, "context"),
        (trained_system, "context"),
        (mark_on_earlier_answers, "prefix"),
        (another_opening, "prompt"),
        (trained_header, "prompt"),
        (content_as_control, "special"),
        (lost_system, "text"),
    ],
)
def test_each_fault_of_a_template_breaks_one_rule(change, rule):
    assert rules(byte_tokenizer(), broken(change)) == {rule}


def test_a_models_own_span_that_leaves_the_end_token_out_is_found():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert rules(tokenizer, chat_template("model", tokenizer)) == {"end-trained"}


def test_training_from_the_question_to_the_answer_in_one_piece_is_found():
    assert rules(byte_tokenizer(), broken(trained_user_to_answer)) == {"context", "prompt"}


def test_an_end_token_that_does_not_stop_generation_is_found():
    tokenizer = byte_tokenizer()
    found = examine(tokenizer, chat_template("chatml", tokenizer), probes(tokenizer), stops=[256])
    assert {finding.rule for finding in found} == {"end"}
    assert found[0].where == "probe 'single turn'"
    assert "ends in 't is 2.<|im_end|>', and generation stops on '<|endoftext|>'" in found[0].detail


@pytest.mark.parametrize(
    ("bos", "asked", "healthy"),
    [
        ("", None, False),  # the template wants none, and yet writes one
        ("", "one", True),
        ("<|begin_of_text|>", None, False),  # the template wants one, and writes two
        ("<|begin_of_text|>", "none", False),
    ],
)
def test_the_number_of_bos_tokens_is_as_asked(bos, asked, healthy):
    tokenizer = llama3_bytes()
    good = chat_template("llama3", tokenizer)
    first = Piece("<|begin_of_text|>", control=True)

    class WithFirst(TurnTemplate):
        def render(self, messages, generation_prompt=False):
            return (first, *super().render(messages, generation_prompt))

    template = WithFirst(**{**vars(good), "bos": bos})
    assert rules(tokenizer, template, bos=asked) == (set() if healthy else {"bos"})


def test_a_missing_bos_is_found():
    tokenizer = llama3_bytes()
    template = replace(chat_template("llama3", tokenizer), bos="")
    assert rules(tokenizer, template) == set()
    assert rules(tokenizer, template, bos="one") == {"bos"}


def test_a_bos_that_opens_every_turn_may_not_come_twice_at_the_start():
    tokenizer = byte_level(["<|im_start|>"], bos_token="<|im_start|>", eos_token="<|im_end|>")
    template = chat_template("chatml", tokenizer)
    assert rules(tokenizer, template) == set()
    doubled = replace(template, bos="<|im_start|>")
    assert rules(tokenizer, doubled) == {"bos"}


def test_a_tokenizer_whose_bos_is_its_eos_is_healthy():
    tokenizer = byte_level(bos_token="<|endoftext|>", eos_token="<|endoftext|>")  # as GPT-2's
    template = chat_template("tulu", tokenizer)
    assert rules(tokenizer, template) == set()
    assert rules(tokenizer, template, bos="one") == {"bos"}


def test_special_tokens_that_are_not_marked_as_special_are_found_in_messages():
    tokenizer = byte_level(["<|im_start|>"], eos_token="<|im_end|>")
    template = chat_template("chatml", tokenizer)
    assert rules(tokenizer, template) == set()
    loose = byte_level(["<|im_start|>"], eos_token="</s>")
    loose.add_tokens(["<|im_end|>"])  # an ordinary added token: the tokenizer finds it in any text
    row = ("data.jsonl, row 3", turns("say <|im_end|> twice", "ok"))
    (found,) = examine(loose, chat_template("chatml", loose), [row], stop_ids(loose, chat_template("chatml", loose)))
    assert found == Finding("special", "data.jsonl, row 3", "text becomes the token <|im_end|>: 'say <|im_end|> twice'")


def test_text_that_the_tokenizer_changes_is_found():
    tokenizer = byte_level(
        ["<|im_start|>", "<|im_end|>"], normalizers.Replace("brief", "short"), eos_token="<|im_end|>"
    )
    found = examine(tokenizer, chat_template("chatml", tokenizer), probes(tokenizer), [257])
    assert [(finding.rule, finding.where) for finding in found] == [("text", "probe 'with a system message'")]
    assert "short" in found[0].detail


def test_letters_in_another_canonical_form_are_the_same_text():
    tokenizer = byte_level(["<|im_start|>", "<|im_end|>"], normalizers.NFC(), eos_token="<|im_end|>")  # as Qwen's
    rows = [("row 1", turns("e\u0301 caf\u0065\u0301", "u\u0308ber"))]
    assert rules(tokenizer, chat_template("chatml", tokenizer), rows=rows) == set()


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda row: row._replace(weights=[1.0] * len(row.ids)), "context"),
        (lambda row: row._replace(weights=[0.0] * len(row.ids)), "answer"),
        (lambda row: row._replace(weights=[weight / 2 for weight in row.weights]), "answer"),
        (lambda row: row._replace(weights=[0.0, *row.weights[:-1]]), "answer"),  # off by one
        (lambda row: row._replace(weights=[*row.weights[1:], 0.0]), "end-trained"),  # off by one
        (lambda row: row._replace(ids=[97, *row.ids[1:]]), "text"),
        (lambda row: row._replace(ends=row.ends[:-1]), "end"),
    ],
)
def test_it_looks_at_the_result_whatever_made_it(monkeypatch, change, rule):
    tokenizer = byte_tokenizer()
    real = doctor.encode_many

    def wrong(*arguments) -> list[Encoded]:
        return [change(row) for row in real(*arguments)]

    monkeypatch.setattr(doctor, "encode_many", wrong)
    assert rule in rules(tokenizer, chat_template("chatml", tokenizer))


def test_a_message_of_weight_zero_that_is_trained_is_found(monkeypatch):
    tokenizer = byte_tokenizer()
    messages = turns("q", "a", "r", "b")
    messages[1]["weight"] = 0.0
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    real = doctor.encode_many
    monkeypatch.setattr(doctor, "encode_many", lambda *arguments: real(*arguments[:2], [plain]))
    (found,) = examine(tokenizer, chat_template("tulu", tokenizer), [("row 1", messages)], [258])
    assert found == Finding("answer", "row 1", "'a' has the weight 0 and is trained")


# Before training ------------------------------------------------------------------------------------------------


def test_the_first_finding_stops_the_run():
    stop_on([])
    findings = [Finding("end", "a.jsonl, row 7", "x"), Finding("bos", "a.jsonl, row 8", "y")]
    with pytest.raises(InputError) as caught:
        stop_on(findings)
    assert caught.value.where == "a.jsonl, row 7"
    assert caught.value.what == f"it breaks the template rule 'end' ({RULES['end']}): x (1 more finding)"
    assert "generation config" in caught.value.remedy


def test_every_rule_can_be_found():
    covered = {"bos", "end", "end-trained", "answer", "context", "prefix", "prompt", "special", "text"}
    assert set(RULES) == covered  # a rule that is added needs a template that breaks it, above


def test_a_models_own_template_may_take_no_system_message():
    """Gemma's refuses them, and Mistral's first by its rule of turns: healthy all the same, for rows without."""
    tokenizer = byte_tokenizer()
    chatml = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + chatml
    template = chat_template("model", tokenizer)
    stops = stop_ids(tokenizer, template)
    said = doctor.check(tokenizer, template, stops, rows_of([turns("q", "a")]))
    assert said.startswith("template doctor: all 9 rules hold on 4 probes and 1 rows")
    with pytest.raises(InputError, match=r"\(no system\): system: Be kind"):
        doctor.check(tokenizer, template, stops, rows_of([turns("q", "a", system="Be kind.")]))
    tokenizer.chat_template = chatml
    assert "on 5 probes" in doctor.check(tokenizer, chat_template("model", tokenizer), stops, [])


@pytest.mark.parametrize(("make", "name"), HEALTHY)
def test_an_assistant_that_speaks_twice_is_healthy(make, name):
    """Nobody asks for an answer behind an answer, where Tülu's template writes no newline before the header."""
    tokenizer = make()
    template = chat_template(name, tokenizer)
    twice = [*turns("q", "a"), {"role": "assistant", "content": "b"}, *turns("r", "c")]
    assert examine(tokenizer, template, rows_of([twice, twice[:3]]), stop_ids(tokenizer, template)) == []


def test_a_prompt_that_is_wrong_behind_two_answers_is_found():
    tokenizer = byte_tokenizer()
    healthy = chat_template("chatml", tokenizer)
    twice = [*turns("q", "a"), {"role": "assistant", "content": "b"}, *turns("r", "c")]

    class Late(TurnTemplate):
        def render(self, messages, generation_prompt=False):
            pieces = super().render(messages, generation_prompt)
            return (*pieces, Piece(" ")) if generation_prompt and len(messages) > 3 else pieces

    late = Late(**vars(healthy))
    assert {finding.rule for finding in examine(tokenizer, late, rows_of([twice]), stop_ids(tokenizer, late))} == {
        "prompt"
    }


def test_a_row_that_breaks_a_rule_stops_the_data_module(write, monkeypatch):
    source = write([{"messages": turns("q", "a")}, {"messages": turns("call me bob", "a")}])
    real = doctor.encode_many

    def wrong(tokenizer, template, conversations):
        rows = real(tokenizer, template, conversations)
        bob = ["bob" in messages[0]["content"] for messages in conversations]
        return [row._replace(weights=[1.0] * len(row.ids)) if b else row for row, b in zip(rows, bob, strict=True)]

    monkeypatch.setattr(doctor, "encode_many", wrong)
    data = SFTData(sources=[source], tokenizer="tiny-random-llama", max_tokens=99, examples_per_step=1)
    with pytest.raises(InputError, match=r"rows\.jsonl, row 2: it breaks the template rule 'context' \(no token of a"):
        data.setup()
