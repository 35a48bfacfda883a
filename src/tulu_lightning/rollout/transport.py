"""How weights reach a server's workers: as files on the same machine, or by broadcast."""

import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from tulu_lightning.rollout.channel import Channel
from tulu_lightning.rollout.engine import EngineError

__all__ = ["Broadcast", "Files", "Rpc", "Transport", "shared_folder"]

SHARED_MEMORY = Path("/dev/shm")
Rpc = Callable[..., Any]
"""`rpc(method, *arguments)` of the workers; gives their answer, as `delivery.joined`."""


def shared_folder() -> Path | None:
    """Shared memory where there is such a folder; None is the one for temporary files."""
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() else None


class Transport(Protocol):
    """Carries one refresh."""

    def carry(
        self,
        named: Iterable[tuple[str, Tensor]],
        shapes: Mapping[str, Sequence[int]],
        rpc: Rpc,
        columns: int,
        version: int,
    ) -> dict[str, Any]:
        """Bring tensors to the workers and load them there.

        Args:
            named: in the engine's dtype, each as whole as the server wants it.
            shapes: of all that may come.
            rpc: see `Rpc`.
            columns: of each matrix to be read back.
            version: for the stamp.

        Returns:
            A `vllm_worker.Report`, as a dict.

        Raises:
            EngineError: the server died, or took too long.
        """
        ...


class Files:
    """Files in a folder that the server sees too: shared memory, on one machine.

    Written one after the other, so the trainer holds no more than one file's tensors at a time.

    Args:
        folder: shared memory where there is such a folder, else the one for temporary files.
        file_mb: size of a file, in MB.
    """

    def __init__(self, folder: str | Path | None = None, file_mb: int = 1024) -> None:
        self._folder = folder or shared_folder()
        self._limit = file_mb << 20

    def carry(
        self,
        named: Iterable[tuple[str, Tensor]],
        shapes: Mapping[str, Sequence[int]],
        rpc: Rpc,
        columns: int,
        version: int,
    ) -> dict[str, Any]:
        """See `Transport`. The files are gone afterwards."""
        folder = Path(tempfile.mkdtemp(prefix="tulu-weights-", dir=self._folder))
        try:
            self._write(iter(named), folder)
            return rpc("tulu_load_files", str(folder), columns, version)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _write(self, named: Iterator[tuple[str, Tensor]], folder: Path) -> None:
        part, size, count = dict[str, Tensor](), 0, 0
        for name, tensor in named:
            part[name] = tensor.contiguous().cpu()
            size += tensor.nbytes
            if size >= self._limit:
                save_file(part, folder / f"{count:05d}.safetensors")
                part, size, count = {}, 0, count + 1
        save_file(part, folder / f"{count:05d}.safetensors")


class Broadcast:
    """A channel that stays open: NCCL between GPUs (not run by us), gloo between CPUs (`rollout.channel`).

    Args:
        workers: of the server: its tensor-parallel size.
        device: of this end, e.g. `cuda:0`; it must not be one of the server's.
        host: address of this machine, as the server sees it.
        seconds: longest wait of each end for the other.
    """

    def __init__(
        self, workers: int = 1, device: str | torch.device = "cpu", host: str = "127.0.0.1", seconds: float = 600
    ) -> None:
        self._workers, self._device = workers, torch.device(device)
        self._host, self._seconds = host, seconds
        self._channel: Channel | None = None

    def carry(
        self,
        named: Iterable[tuple[str, Tensor]],
        shapes: Mapping[str, Sequence[int]],
        rpc: Rpc,
        columns: int,
        version: int,
    ) -> dict[str, Any]:
        """See `Transport`. An error on either side closes the channel; the next refresh opens another."""
        with ThreadPoolExecutor(1) as pool:
            try:
                if self._channel is None:
                    port, world = _free_port(self._host), 1 + self._workers
                    joining = pool.submit(rpc, "tulu_join", self._host, port, world, self._seconds)
                    self._channel = self._open(port, world, joining)
                loading = pool.submit(rpc, "tulu_load_channel", shapes, columns, version)
                self._send(named, list(shapes), loading)
                return loading.result()
            except BaseException:
                self._channel = None
                raise

    def _open(self, port: int, world: int, joining: "Future[Any]") -> Channel:
        try:
            channel = Channel(self._host, port, 0, world, self._device, self._seconds)
        except RuntimeError as error:
            raise self._failed("come to the channel", joining, error) from error
        joining.result()
        return channel

    def _send(self, named: Iterable[tuple[str, Tensor]], names: Sequence[str], loading: "Future[Any]") -> None:
        assert self._channel is not None
        try:
            self._channel.send(named, names)
        except RuntimeError as error:
            raise self._failed("take the weights", loading, error) from error

    def _failed(self, what: str, asked: "Future[Any]", error: RuntimeError) -> Exception:
        """The server's own error, if it has one by now: that is the cause, and ours the effect."""
        try:
            theirs = asked.exception(timeout=5)
        except FutureTimeout:
            theirs = None
        if isinstance(theirs, EngineError):
            return theirs
        limit = f"the trainer waited at most {self._seconds:g} s for {self._workers} of the server's workers to {what}"
        return EngineError(f"{limit} at {self._host}: {theirs or error}")


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
