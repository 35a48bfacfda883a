import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INSTALLED = importlib.util.find_spec("vllm") is not None
sys.path += [str(HERE.parent / "stages"), str(HERE)]  # `stage_runs`, `moved_policies`


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            if not INSTALLED:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


@pytest.fixture(scope="session")
def tiny_server(tiny):
    """An engine on a server of its own; the tests of test_server.py kill it in the end."""
    from tulu_lightning.rollout.server import ServerEngine

    engine = ServerEngine.started(tiny, max_model_len=1024, kv_cache_mb=64)
    yield engine
    engine.close()
