"""How vLLM is started on a GPU that a trainer shares. None is needed here: only what it is asked for is looked at."""

import sys
from types import SimpleNamespace

import pytest
import torch

from tulu_lightning.rollout import server_process, vllm
from tulu_lightning.rollout.vllm import VLLMEngine


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def asked_in_process(monkeypatch, tiny, **settings):
    asked = {}

    def build(folder, chosen):
        asked.update(chosen)
        return SimpleNamespace(model_config=SimpleNamespace(max_model_len=64))

    monkeypatch.setattr(vllm, "_build", build)
    VLLMEngine.from_folder(tiny, **settings)
    return asked


def asked_of_a_server(monkeypatch, tiny, **settings):
    commands = []

    def popen(command, **_):
        commands.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(server_process.subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        server_process.start_server(tiny, **settings)
    return commands[0]


def test_with_memory_of_its_own_it_starts_however_little_of_the_gpu_is_free(gpu, monkeypatch, tiny):
    asked = asked_in_process(monkeypatch, tiny, kv_cache_mb=256)
    assert (asked["kv_cache_memory_bytes"], asked["gpu_memory_utilization"]) == (256 << 20, 0.01)
    command = asked_of_a_server(monkeypatch, tiny, kv_cache_mb=256)
    assert command[command.index("--gpu-memory-utilization") + 1] == "0.01"
    assert command[command.index("--kv-cache-memory-bytes") + 1] == str(256 << 20)


def test_without_it_takes_what_it_finds(gpu, monkeypatch, tiny):
    asked = asked_in_process(monkeypatch, tiny)
    assert asked["kv_cache_memory_bytes"] is None
    assert "gpu_memory_utilization" not in asked
    assert not {"--gpu-memory-utilization", "--kv-cache-memory-bytes"} & set(asked_of_a_server(monkeypatch, tiny))


def test_a_share_that_is_asked_for_is_kept(gpu, monkeypatch, tiny):
    assert (
        asked_in_process(monkeypatch, tiny, kv_cache_mb=9, gpu_memory_utilization=0.5)["gpu_memory_utilization"] == 0.5
    )


def test_each_process_has_it_on_its_own_gpu(gpu, monkeypatch):
    class UniProcExecutor:
        def _distributed_args(self):
            return "tcp://127.0.0.1:1", 0, 0

    module = SimpleNamespace(UniProcExecutor=UniProcExecutor)
    monkeypatch.setitem(sys.modules, "vllm.v1.executor.uniproc_executor", module)
    for device in (3, 5):  # a second engine is built like the first
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        vllm._take_this_gpu()
        assert UniProcExecutor()._distributed_args() == ("tcp://127.0.0.1:1", 0, device)


def test_on_a_cpu_nothing_is_asked_of_a_gpu(monkeypatch, tiny):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "gpu_memory_utilization" not in asked_in_process(monkeypatch, tiny, kv_cache_mb=256)
    assert "--gpu-memory-utilization" not in asked_of_a_server(monkeypatch, tiny, kv_cache_mb=256)
