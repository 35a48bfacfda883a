"""Model FLOPs, against numbers worked out by hand and PyTorch's own count of a plain model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from tulu_lightning.core.flops import Shape, Work, pack_work, training_flops
from tulu_lightning.core.packing import filler, pack
from tulu_lightning.types import Document, Segment


def segment(tokens, weight=1.0, parent=-1):
    return Segment(torch.zeros(tokens, dtype=torch.int64), torch.full((tokens,), weight), parent)


def test_a_causal_row_of_n_tokens_has_n_n_plus_1_half_pairs_and_its_first_token_is_not_scored():
    packed = pack([Document((segment(5),)), Document((segment(3),))], rows=(0, 1))
    assert pack_work(packed) == Work(tokens=8, scored=4 + 2, pairs=15 + 6)


def test_answers_see_the_prompt_and_themselves():
    pair = Document((segment(3, 0.0), segment(2, 1.0, 0), segment(2, 1.0, 0)))
    # prompt 1 + 2 + 3; each answer 4 + 5
    assert pack_work(pack([pair], rows=(0,))) == Work(tokens=7, scored=4, pairs=6 + 9 + 9)


def test_fillers_and_padding_are_no_work():
    row = Document((segment(5),))
    assert pack_work(filler(row)) == Work(0, 0, 0)
    padded = pack([row, Document((segment(4, 0.0),))], rows=(0,))._replace(padding=4)
    assert pack_work(padded) == pack_work(pack([row], rows=(0,)))


def test_flops_by_hand():
    work = Work(tokens=3, scored=2, pairs=6)
    assert training_flops(Shape(10, 10, 100, True, 4), work) == 6 * 10 * 3 + 6 * 100 * 2 + 12 * 4 * 6
    # LoRA: 8 of 18 weights are trained, the head is not
    assert training_flops(Shape(18, 8, 100, False, 4), work) == (4 * 18 + 2 * 8) * 3 + 4 * 100 * 2 + 12 * 4 * 6


def test_it_is_what_pytorch_counts_but_for_the_masked_half_of_attention():
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    length = 12
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.int64), use_cache=False).logits.sum().backward()
    linear = sum(p.numel() for name, p in model.model.named_parameters() if "proj" in name)
    shape = Shape(linear, linear, 40 * 32, True, attention=2 * 4 * 16)
    assert counter.get_total_flops() == pytest.approx(training_flops(shape, Work(length, length, length**2)), rel=0.01)
