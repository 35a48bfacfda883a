"""What only a GPU can show. Where there is none these tests skip; TULU_GPU_TESTS_ON=cpu tries the tests themselves."""

import os
import sys
from pathlib import Path

import pytest
import torch

for folder in ("stages", "rollout"):  # `stage_runs`, `stage_faults`; what every engine is held against
    sys.path.append(str(Path(__file__).parents[1] / folder))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where to compute."""
    device = torch.device(os.environ.get("TULU_GPU_TESTS_ON", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    return device


@pytest.fixture(scope="session")
def accelerator(device) -> str:
    """The same, in Lightning's word."""
    return "gpu" if device.type == "cuda" else device.type
