"""Weights from one process to others by broadcast: NCCL between GPUs, gloo between CPUs. Rank 0 sends.

A process group of its own, beside the trainer's default one, which is not touched. Only the CPU side has been run; on
GPUs the same calls go to NCCL.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Channel"]

END, BROKEN = -1, -2


class Channel:
    """One end of it; the constructor waits until all ends are there.

    Args:
        host: where rank 0 listens.
        port: there.
        rank: 0 sends, the others receive.
        world: how many there are.
        device: what the tensors go through: `cuda:0` (NCCL) or `cpu` (gloo).
        seconds: longest wait, for the others at the start and for each tensor.

    Raises:
        RuntimeError: the others did not come in time.
    """

    def __init__(self, host: str, port: int, rank: int, world: int, device: torch.device, seconds: float) -> None:
        self._device, limit = device, timedelta(seconds=seconds)
        backends: Any = dist  # its stubs leave these classes out
        self._store = backends.TCPStore(host, port, world, rank == 0, limit)
        if device.type == "cuda":
            options = backends.ProcessGroupNCCL.Options()
            options._timeout = limit
            self._group = backends.ProcessGroupNCCL(self._store, rank, world, options)
        else:
            options = backends.ProcessGroupGloo._Options()
            options._devices = [backends.ProcessGroupGloo.create_device(hostname=host)]
            options._timeout = limit
            self._group = backends.ProcessGroupGloo(self._store, rank, world, options)

    def send(self, named: Iterable[tuple[str, Tensor]], names: Sequence[str]) -> None:
        """Send tensors in any order; their names are among `names`, which both ends know.

        An error in the making of them is passed on here, and the receivers are told.
        """
        places = {name: place for place, name in enumerate(names)}
        try:
            for name, tensor in named:
                self._tell(places[name])
                self._broadcast(tensor.to(self._device))
        except BaseException:
            self._tell(BROKEN)
            raise
        self._tell(END)

    def receive(self, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """What is sent, in its order; the keys of `shapes` are the sender's `names`.

        Raises:
            RuntimeError: the sender gave up, or nothing came in time.
        """
        names = list(shapes)
        while (place := self._tell(END)) >= 0:
            tensor = torch.empty(tuple(shapes[names[place]]), dtype=dtype, device=self._device)
            self._broadcast(tensor)
            yield names[place], tensor
        if place == BROKEN:
            raise RuntimeError("the sender of the weights gave up in the middle")

    def _tell(self, place: int) -> int:
        number = torch.tensor([place], device=self._device)
        self._broadcast(number)
        return int(number)

    def _broadcast(self, tensor: Tensor) -> None:
        """As bytes, whatever the dtype."""
        whole = tensor.contiguous()
        self._group.broadcast([whole.view(-1).view(torch.uint8)], dist.BroadcastOptions()).wait()
