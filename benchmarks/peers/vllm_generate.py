"""Worker of `generate.py`: vLLM in one process on the CPU. Runs in vLLM's environment, which need not have this project."""

import os

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # its default leaves a core to itself

from collections.abc import Callable
from typing import Any

from rates import main
from vllm import LLM, SamplingParams


def build(job: dict[str, Any]) -> Callable[[int], int]:
    rows = len(job["prompts"]) * job["samples"]
    llm = LLM(
        job["model"],
        dtype=job["settings"]["dtype"],
        enforce_eager=True,
        max_num_seqs=rows,
        max_model_len=max(map(len, job["prompts"])) + job["new_tokens"] + 1,
        max_num_batched_tokens=8192,
        kv_cache_memory_bytes=2 << 30,
        logprobs_mode="processed_logprobs",
    )
    prompts = [{"prompt_token_ids": list(prompt)} for prompt in job["prompts"]]

    def generate(_: int) -> int:  # a seed of a request fails on a CPU where its prompt is computed in parts
        # Log-probs of the sampled tokens too: reinforcement learning needs them, and ours gives them.
        sampling = SamplingParams(
            n=job["samples"],
            temperature=1.0,
            max_tokens=job["new_tokens"],
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
        )
        llm.reset_prefix_cache()  # a call's prompts are new to it, as after every refresh of the weights
        found = llm.generate(prompts, sampling, use_tqdm=False)
        return sum(len(out.token_ids) for request in found for out in request.outputs)

    return generate


main(build)
