"""Work in the middle of a run that the run does not notice."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["undisturbed"]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave the generators of Python, NumPy and PyTorch (its devices too) as they were.

    Our engines sample by keys of their own; what a task's data set or a user's verifier draws is not ours to know.
    """
    python, array = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
