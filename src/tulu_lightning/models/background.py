"""Work that goes on beside training, one piece at a time: checkpoints being written."""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch import Tensor

from tulu_lightning.errors import RunStopped
from tulu_lightning.progress import duration

__all__ = ["WRITING", "Background", "snapshot"]

WRITING = timedelta(hours=2)
"""What a checkpoint may take in the background before nobody waits for it any more."""


class Background:
    """Runs one piece of work in a thread, and hands on what goes wrong in it to whoever waits.

    Args:
        seconds: longest wait for one piece.
    """

    def __init__(self, seconds: float = WRITING.total_seconds()) -> None:
        self.seconds = seconds
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._what = ""

    def start(self, work: Callable[[], None], what: str) -> None:
        """Begin, once what went before has ended.

        Args:
            work: what to do.
            what: it, for the messages, e.g. "checkpoint step-000004.ckpt".

        Raises:
            BaseException: what went wrong with the work before, as `wait` says.
        """
        self.wait()
        self._what = what
        # A daemon: who ends in order has waited, and work that never ends must not keep the process.
        self._thread = threading.Thread(target=self._run, args=(work,), name=what, daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised in the thread that waits
            self._error = error
            print(f"\n{self._what} could not be written: {error}; the run stops at the next save", flush=True)

    def wait(self) -> None:
        """Wait for the end of it.

        Raises:
            BaseException: what went wrong.
            RunStopped: the work has not ended in time, and is given up.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(self.seconds)
            if thread.is_alive():
                raise RunStopped(
                    f"{self._what} has not been written in {duration(self.seconds)}: its disk does not answer. The "
                    "checkpoints before it are whole; the same command goes on from the last one."
                )
        error, self._error = self._error, None
        if error is not None:
            raise error


def snapshot(value: Any) -> Any:
    """A copy on the CPU of all tensors in nested dicts, lists and tuples: what training changes next is not in it.

    A tensor that is there twice, as tied weights are, is copied once and stays one.
    """
    return _copy(value, {})


def _copy(value: Any, known: dict[Any, Tensor]) -> Any:
    if isinstance(value, Tensor):  # sharded ones, too: of those it is this rank's part
        own = value.detach()
        if type(own) is not Tensor:
            return _on_cpu(own)
        key = (own.device, own.data_ptr(), own.shape, own.stride(), own.dtype)
        if not own.numel() or key not in known:
            known[key] = _on_cpu(own)
        return known[key]
    if isinstance(value, dict):
        return type(value)((key, _copy(item, known)) for key, item in value.items()) if value else value
    if isinstance(value, list):
        return [_copy(item, known) for item in value]
    if type(value) is tuple:
        return tuple(_copy(item, known) for item in value)
    return value


def _on_cpu(own: Tensor) -> Tensor:
    if own.device.type != "cpu":
        return own.to("cpu")
    if type(own) is Tensor:
        return own.clone()
    # Of what is made of tensors (a shard, 8-bit moments, a shard of those) each is copied: torchao's has no clone.
    made: Any = own
    names, rest = made.__tensor_flatten__()
    held = {name: getattr(own, name) for name in names}
    parts = {name: _on_cpu(part) if isinstance(part, Tensor) else part for name, part in held.items()}
    return type(made).__tensor_unflatten__(parts, rest, own.shape, own.stride())
