"""`tiny-random-llama`: a seeded random Llama of 2.4M parameters with a byte-level tokenizer, for tests and dry runs.

It knows nothing; its use is that every part of the program runs on it in milliseconds.
"""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from tulu_lightning.assets.cache import build_once

__all__ = ["NAME", "byte_tokenizer", "folder"]

NAME = "tiny-random-llama"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 256, 257, 258
PAD_ID, EOS_ID = 256, 258
VOCABULARY = 264  # 256 bytes and the special tokens, rounded up to a multiple of 8


def folder() -> Path:
    """The model's folder, built on first use."""
    return build_once(f"{NAME}-r2", _build)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte (ids 0 to 255) and three special tokens (256 to 258); EOS is `<|im_end|>`."""
    # ByteLevel's alphabet stands for byte 0 to 255, but not in that order; sorted, it is at least a fixed one.
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def _build(target: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # the work takes a few milliseconds
    model.save_pretrained(target)
    if bars:
        transformers_logging.enable_progress_bar()
    byte_tokenizer().save_pretrained(target)
