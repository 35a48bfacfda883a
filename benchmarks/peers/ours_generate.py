"""Worker of `generate.py`: the engine of this project that runs in the trainer's process."""

from collections.abc import Callable
from typing import Any

import torch
from rates import main

from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.types import Sampling


def build(job: dict[str, Any]) -> Callable[[int], int]:
    engine = LocalEngine.from_folder(
        job["model"], getattr(torch, job["settings"]["dtype"]), job["device"], **job["settings"]["engine"]
    )

    def generate(seed: int) -> int:
        groups = engine.generate(job["prompts"], job["samples"], Sampling(job["new_tokens"]), seed)
        return sum(len(done.ids_L) for group in groups for done in group)

    return generate


main(build)
