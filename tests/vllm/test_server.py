"""A vLLM server of its own: when it dies, when somebody else meddles, when it does not start."""

import os
import signal
import threading
import time

import pytest
from transformers import AutoModelForCausalLM

from tulu_lightning.rollout.engine import EngineError, RefreshError
from tulu_lightning.rollout.fingerprint import fingerprint
from tulu_lightning.rollout.server import ServerEngine
from tulu_lightning.rollout.server_process import start_server
from tulu_lightning.rollout.transport import Broadcast, Files
from tulu_lightning.types import Sampling


@pytest.fixture(scope="module")
def weights(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny).state_dict()


@pytest.fixture
def engine(tiny_server):
    return tiny_server


def test_a_server_of_somebody_else_is_not_sampled_from_before_its_first_refresh(engine, tiny, weights):
    engine.refresh(weights.items(), 4)
    other = ServerEngine(engine._client.url, tiny, max_model_len=64)
    assert (other.version, other.positions) == (-1, 64)
    with pytest.raises(RuntimeError, match="never came"):
        other.generate([[1]], 1, Sampling(1), 0)
    other.refresh(weights.items(), 5)
    assert other.generate([[1]], 1, Sampling(1), 0)[0][0].version == 5
    # Now the first engine's weights are gone, and it finds out.
    with pytest.raises(EngineError, match=r"holds the weights of version 5 .* refresh it"):
        engine.generate([[1]], 1, Sampling(1), 0)
    engine.refresh(weights.items(), 6)
    assert engine.generate([[1]], 1, Sampling(1), 0)[0][0].version == 6


def test_weights_travel_in_several_files_and_leave_none_behind(engine, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_transport", Files(tmp_path, file_mb=1))
    seen = []
    rpc = engine._rpc
    monkeypatch.setattr(engine, "_rpc", lambda *a: seen.append(len(list(tmp_path.glob("*/*.safetensors")))) or rpc(*a))
    engine.refresh(weights.items(), 7)
    assert seen[0] > 3
    assert list(tmp_path.iterdir()) == []


def test_weights_travel_by_broadcast_and_a_broken_one_is_begun_anew(engine, weights):
    def breaking():
        yield from list(weights.items())[:5]
        raise ValueError("the trainer's own fault")

    name = "model.norm.weight"
    engine._transport, files = Broadcast(seconds=60), engine._transport
    try:
        for version in (20, 21):  # the second goes through the open channel
            changed = {**weights, name: weights[name] + version}
            engine.refresh(changed.items(), version)
            assert engine.fingerprint() == fingerprint(changed.items())
        with pytest.raises(ValueError, match="own fault"):
            engine.refresh(breaking(), 22)
        assert engine.version == -1
        with pytest.raises(RefreshError, match=f"not delivered: {name}"):
            engine.refresh(((n, w) for n, w in weights.items() if n != name), 23)
        engine.refresh(weights.items(), 24)
        assert engine.generate([[1]], 1, Sampling(1), 0)[0][0].version == 24
    finally:
        engine._transport = files


def test_an_answer_that_takes_too_long_names_who_waited_for_whom(engine, tiny, weights):
    impatient = ServerEngine(engine._client.url, tiny)
    impatient._seconds = 0.5
    os.killpg(engine._server.process.pid, signal.SIGSTOP)  # it listens, and does nothing
    try:
        with pytest.raises(
            EngineError, match=r"the trainer waited .* s for POST /collective_rpc of the server at http://127"
        ):
            impatient.refresh(weights.items(), 1)
    finally:
        os.killpg(engine._server.process.pid, signal.SIGCONT)
    assert impatient.version == -1


def test_no_server_no_engine(tiny):
    with pytest.raises(EngineError, match=r"GET /v1/models of the server at http://127.0.0.1:9: no connection"):
        ServerEngine("http://127.0.0.1:9", tiny)


def test_a_server_that_does_not_start_shows_its_last_words(tmp_path):
    with pytest.raises(EngineError, match="did not start; its process ended with status") as caught:
        start_server(tmp_path / "nothing", seconds=120)
    assert "nothing" in str(caught.value)


def test_a_server_that_is_too_slow_is_ended(tiny):
    said = []
    with pytest.raises(EngineError, match="waited 1 s for the vLLM server"):
        start_server(tiny, seconds=0.5, say=said.append)


def test_killed_in_the_middle_of_a_step(engine, weights):  # last: the server does not come back
    engine.refresh(weights.items(), 8)
    group = engine._server.process.pid
    killer = threading.Timer(1.0, lambda: os.killpg(group, signal.SIGKILL))
    killer.start()
    start = time.monotonic()
    with pytest.raises(EngineError, match="POST /v1/completions of the server"):
        engine.generate([[i] for i in range(200)], 4, Sampling(1000), 0)
    killer.join()
    engine._server.process.wait(timeout=10)  # the connection breaks a moment before the process has ended
    assert time.monotonic() - start < 30
    health = engine.health()
    assert not health.alive
    assert "its process ended with status -9" in health.detail
    with pytest.raises(EngineError):
        engine.refresh(weights.items(), 9)
    with pytest.raises(RuntimeError, match="never came"):
        engine.generate([[1]], 1, Sampling(1), 0)
