"""The state of every generator that belongs to a process, not to a step: Python's, NumPy's, PyTorch's, the devices'.

What a step consists of, and what is sampled in it, are functions of the seed and the step; these states matter to what
users add (a stage of their own, a callback) and to a model that drops units.
"""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

__all__ = ["everyones", "restore"]


def everyones() -> list[dict[str, Any]]:
    """The states of all ranks, in order, as plain values and tensors; a collective if there are several."""
    version, words, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    own = {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(place), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
    }  # fmt: skip
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [own]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return every


def restore(states: list[dict[str, Any]], rank: int) -> bool:
    """Set this process's generators.

    Args:
        states: of all ranks of the run that was saved.
        rank: of this process.

    Returns:
        Whether there was a state for it: a rank that the saved run did not have keeps its own.
    """
    if rank >= len(states):
        return False
    own = states[rank]
    version, words, gauss = own["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, place, has_gauss, cached = own["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(own["torch"].cpu())
    if own["cuda"] and len(own["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in own["cuda"]])
    return True
