"""Worker of `generate.py`: transformers' `generate`."""

from collections.abc import Callable
from typing import Any

import torch
from rates import main
from transformers import AutoModelForCausalLM


def build(job: dict[str, Any]) -> Callable[[int], int]:
    model = (
        AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["settings"]["dtype"]))
        .eval()
        .to(job["device"])
    )
    width, new = max(map(len, job["prompts"])), job["new_tokens"]
    ids = torch.zeros(len(job["prompts"]), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(job["prompts"]):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(job["device"]), mask.to(job["device"])
    static = {"cache_implementation": "static", "disable_compile": True} if job["settings"]["cache"] == "static" else {}

    def generate(seed: int) -> int:
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            num_return_sequences=job["samples"],
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
            **static,
        )
        if out.is_cuda:
            torch.cuda.synchronize()
        assert out.shape == (len(job["prompts"]) * job["samples"], width + new)
        return len(out) * new

    return generate


main(build)
