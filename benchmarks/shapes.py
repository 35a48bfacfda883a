"""A model of a given shape with random weights, for benchmarks: what is computed does not depend on what it has learned.

    python benchmarks/shapes.py llama-1b /tmp/llama-1b

The folder has SmolLM2's tokenizer, whose ids all lie in the vocabulary, and weights in bf16.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tulu_lightning.assets.models import load_tokenizer, resolve_model

TOKENIZER = "smollm2-135m-instruct"
LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0}
SHAPES = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        **LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "llama-8b": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}


def make(shape: str, folder: Path) -> None:
    """Write the folder, unless it is there."""
    if (folder / "config.json").is_file():
        return
    tokenizer = load_tokenizer(str(resolve_model(TOKENIZER)))
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    tokenizer.save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        raise SystemExit(f"{__doc__}\nShapes: {json.dumps(list(SHAPES))}")
    make(sys.argv[1], Path(sys.argv[2]))
