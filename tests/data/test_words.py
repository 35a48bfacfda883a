"""Looking words up gives what the tokenizer gives, or is not done at all."""

import random
import re
import unicodedata

import pytest
from chat_tokenizers import NASTY, byte_level, llama3, smollm2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tulu_lightning.data import words
from tulu_lightning.data.chat import chat_template, encode, encode_many
from tulu_lightning.data.words import COMMON, word_table

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = ["The lazy dog's 1,234 naïve cafés — isn't “it”?\n\n    return x  # 25 % ½\n"] * 50


def trained(pre_tokenizer, normalizer=None) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer with merges."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def byte_level_after(*parts, use_regex=True):
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


def split(pattern, behavior="isolated"):
    return byte_level_after(pre_tokenizers.Split(Regex(pattern), behavior), use_regex=False)


KNOWN = {
    "gpt2": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "digits": lambda: trained(byte_level_after(pre_tokenizers.Digits(individual_digits=True))),
    "qwen2": lambda: trained(split(QWEN2), normalizers.NFC()),
    "smollm2": smollm2,
    "llama3": llama3,
}


def plain(tokenizer):
    tokenizer.backend_tokenizer.encode_special_tokens = True
    return tokenizer


def texts(seed: int, count: int) -> list[str]:
    """Random strings with many borders between kinds of letters, and all of `NASTY`."""
    draw = random.Random(seed)
    parts = [
        *" \n\t\r'\"_-+.,",
        "  ",
        "\n\n",
        "ab",
        "Xy",
        "é",
        "12",
        "²",
        "'s",
        "'LL",
        "“",
        "—",
        "…",
        "{",
        "<|im_end|>",
    ]
    made = ["".join(draw.choices(parts, k=draw.randint(1, 12))) for _ in range(count)]
    return [*made, *(message["content"] for messages in NASTY for message in messages)]


@pytest.mark.parametrize("name", KNOWN)
def test_words_have_the_ids_that_the_tokenizer_gives_them_in_their_text(name):
    tokenizer = plain(KNOWN[name]())
    table = word_table(tokenizer)
    assert table is not None
    given = texts(seed=0, count=3000)
    found = table.encode(given)
    assert found == {text: tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in found}
    assert set(found) == {text for text in given if COMMON.fullmatch(text)}
    assert len(found) > 2000
    assert table.encode(given) == found  # from the table alone


def test_the_letters_are_those_of_unicode():
    common = [letter for letter in map(chr, range(0x2200)) if COMMON.fullmatch(letter)]
    assert len(common) > 240
    for letter in common:
        kind = unicodedata.category(letter)[0]
        assert (re.fullmatch(f"[{words.LETTERS}]", letter) is None) == (kind != "L")
        assert (re.fullmatch(f"[{words.NUMBERS}]", letter) is None) == (kind != "N")
        assert kind != "Z" or letter == " "  # no white space but that of ASCII


UNKNOWN = {
    "prefix space": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no pattern": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "grouped digits": lambda: trained(byte_level_after(pre_tokenizers.Digits(individual_digits=False))),
    "another class": lambda: trained(split(r"\p{Lu}?\p{L}+|\s+|[^\s\p{L}]+")),
    "merged borders": lambda: trained(split(QWEN2, "merged_with_previous")),
    "two patterns": lambda: trained(
        byte_level_after(pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True))
    ),
    "other normalizer": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Lowercase()),
    "metaspace": lambda: trained(pre_tokenizers.Metaspace()),
    "nothing": lambda: byte_level_without_cutting(),
}


def byte_level_without_cutting():
    tokenizer = byte_level(eos_token="</s>")
    tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_tokenizer_that_cuts_in_another_way_gets_no_table(name):
    assert word_table(plain(UNKNOWN[name]())) is None


def test_a_pattern_that_is_not_the_tokenizers_fails_the_trial(monkeypatch):
    tokenizer = plain(KNOWN["gpt2"]())
    monkeypatch.setattr(words, "_pattern", lambda backend: words.GPT2.replace(r"|\s+(?!\S)", ""))
    assert word_table(tokenizer) is None


def test_added_tokens_that_are_ordinary_text_are_left_to_the_tokenizer():
    tokenizer = KNOWN["gpt2"]()
    assert word_table(plain(tokenizer)) is not None
    tokenizer.add_tokens(["<think>"])
    table = word_table(plain(tokenizer))  # another table: the old one knows nothing of it
    assert table is not None
    assert table.encode(["a <think> b", "a < think> b"]).keys() == {"a < think> b"}
    template = chat_template("tulu", tokenizer)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<think>a</think>b"}]
    (row,) = encode_many(tokenizer, template, [messages])
    assert row.ids == encode(tokenizer, template, messages)[0]
    assert row.ids.count(tokenizer.convert_tokens_to_ids("<think>")) == 1


def test_a_full_table_starts_anew(monkeypatch):
    tokenizer = plain(KNOWN["gpt2"]())
    table = word_table(tokenizer)
    assert table is not None
    expected = table.encode(texts(1, 200))
    monkeypatch.setattr(words, "LIMIT", 3)
    assert table.encode(texts(1, 200)) == expected
    assert table.encode(["ab"])
    assert len(table._ids) == 1
