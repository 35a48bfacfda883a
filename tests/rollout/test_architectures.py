"""The engine on other architectures than Llama: absolute positions, ALiBi, sliding windows, soft caps, biases, state spaces."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.types import Sampling

ROTARY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
WINDOW = 6
CONFIGS = {
    "mistral, sliding window": MistralConfig(**ROTARY, sliding_window=WINDOW),
    "gemma 2, window and soft caps": Gemma2Config(**ROTARY, sliding_window=WINDOW, query_pre_attn_scalar=8),
    "qwen 2": Qwen2Config(**ROTARY),
    "qwen 3": Qwen3Config(**ROTARY),
    "gpt 2": GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3),
    "opt": OPTConfig(
        vocab_size=60,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.3,
    ),
    "bloom, ALiBi": BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
}
PREFIX = [7, 3, 5, 11, 13, 2, 9, 4, 6, 8]  # longer than the window, and long enough to be computed apart
PROMPTS = [[*PREFIX, 21], [*PREFIX, 30, 31, 32, 33, 34], [*PREFIX, 40, 41]]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_transformers_generate(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    out = LocalEngine.from_model(model).generate(PROMPTS, 2, Sampling(9, 0.0), 0)
    for prompt, group in zip(PROMPTS, out, strict=True):
        reference = model.generate(
            torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        for completion in group:
            assert completion.ids_L.tolist() == reference[0, len(prompt) :].tolist()
