"""Start a vLLM server as a child process, wait until it answers, and end it."""

import atexit
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tulu_lightning
from tulu_lightning.rollout.client import Client
from tulu_lightning.rollout.engine import EngineError
from tulu_lightning.rollout.requests import START_SHARE

__all__ = ["Server", "start_server"]

WORKER = "tulu_lightning.rollout.vllm_worker.Worker"


class Server:
    """A running server.

    Args:
        process: the child, leader of a process group of its own.
        url: where it answers.
        log: file of its output.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log
        atexit.register(self.close)

    def state(self) -> str:
        """For messages: empty while it runs, else its exit status and the end of its log."""
        status = self.process.poll()
        return "" if status is None else f"; its process ended with status {status}, last words:\n{_tail(self.log)}"

    def close(self, seconds: float = 10) -> None:
        """End it and what it started; kill what does not go in that time."""
        atexit.unregister(self.close)
        for how in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, how)
                self.process.wait(seconds)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()


def start_server(
    folder: str | Path,
    dtype: str = "float32",
    *,
    max_model_len: int | None = None,
    port: int | None = None,
    kv_cache_mb: int | None = None,
    seconds: float = 600,
    log: str | Path | None = None,
    python: str | None = None,
    threads: int | None = None,
    options: tuple[str, ...] = (),
    say: Callable[[str], None] | None = None,
) -> Server:
    """Start vLLM's OpenAI-compatible server on this machine, with what `ServerEngine` needs, and wait until it answers.

    Args:
        folder: model folder.
        dtype: of the weights.
        max_model_len: prompt and new tokens of one sample at most.
        port: on the loopback address; a free one if left out.
        kv_cache_mb: memory for keys and values, in MB. If left out, 1024 on a CPU; on a GPU vLLM takes what it finds.
        seconds: how long to wait.
        log: file for its output; a temporary one if left out.
        python: interpreter that has vLLM, e.g. `.venv-vllm/bin/python`; this one if left out.
        threads: of the model on a CPU; as many as `OMP_NUM_THREADS` says if left out.
        options: more of vLLM's own, e.g. `("--max-num-seqs", "64")`.
        say: told every ten seconds how it goes; prints to standard error if left out.

    Raises:
        EngineError: it ended, or did not answer in time; with the end of its log.
    """
    port = port or _free_port()
    url, file = f"http://127.0.0.1:{port}", Path(log or tempfile.mkstemp(prefix="tulu-vllm-", suffix=".log")[1])
    command = [python or sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--worker-extension-cls", WORKER]
    command += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--disable-uvicorn-access-log"]
    if not torch.cuda.is_available():
        command.append("--enforce-eager")
        kv_cache_mb = kv_cache_mb or 1024
    beside = kv_cache_mb is not None and torch.cuda.is_available()
    for option, value in (
        ("--max-model-len", max_model_len),
        ("--gpu-memory-utilization", START_SHARE if beside else None),
        ("--kv-cache-memory-bytes", kv_cache_mb and kv_cache_mb << 20),
    ):
        command += [] if value is None else [option, str(value)]
    environment = {
        **os.environ,
        "VLLM_SERVER_DEV_MODE": "1",  # the routes that refresh; the loopback address keeps others out
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker inside the engine's process: one start less
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(tulu_lightning.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        ),
        **({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if "--enable-lora" in options else {}),
        **({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
    }
    with file.open("ab") as output:
        process = subprocess.Popen(
            [*command, *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent if threading.current_thread() is threading.main_thread() else None,
        )
    server = Server(process, url, file)
    try:
        _wait(server, seconds, say or _print)
    except BaseException:
        server.close()
        raise
    return server


def _wait(server: Server, seconds: float, say: Callable[[str], None]) -> None:
    start = told = time.monotonic()
    client = Client(server.url)
    while True:
        now = time.monotonic()
        if server.process.poll() is not None:
            raise EngineError(f"the vLLM server at {server.url} did not start{server.state()}")
        if now - start > seconds:
            text = f"the trainer waited {now - start:.0f} s for the vLLM server at {server.url} to start"
            raise EngineError(f"{text}; last words of {server.log}:\n{_tail(server.log)}")
        try:
            client.get("/health", 5)
            return
        except (EngineError, RuntimeError):
            time.sleep(0.2)
        if now - told >= 10:
            told = now
            say(f"vLLM server at {server.url}: starting since {now - start:.0f} s, log in {server.log}")


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tail(log: Path, lines: int = 15) -> str:
    try:
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    except OSError as error:
        return f"(no log: {error})"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _die_with_parent() -> Any:
    """In the child: a trainer that is killed takes its server with it (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
