"""Policies whose adapters have moved, and their own scores: what engines are held against."""

import torch
from transformers import AutoModelForCausalLM

from tulu_lightning.models.lora import Lora, adapt

LORA = Lora(r=4, alpha=12, targets=["q_proj", "v_proj", "down_proj"])  # a scale of 3; room is made for rank 8


def policy(folder, seed):
    """A policy whose adapters have moved."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    adapt(model, LORA, str(folder))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def scores(model, prompt, response):
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logp = torch.log_softmax(model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float(), -1)
    return logp.gather(1, torch.tensor(response)[:, None])[:, 0]
