"""AdamW whose two moments are kept in 8 bits: torchao's, which is sharded by FSDP2 (bitsandbytes' is not).

Moments are quantised in blocks of 256 by a scale each (Dettmers et al. 2022); the arithmetic of a step is fp32. Tensors of
fewer than 4,096 numbers, or whose part on a rank is no multiple of 256, keep fp32 moments.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit as TorchaoAdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned

__all__ = ["AdamW8bit"]


class AdamW8bit(TorchaoAdamW8bit):
    """torchao's, with a rate that is set as that of any other optimiser: by a number in the group."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; on a CPU without the compiler, which would take longer than the run."""
        rates = [float(group["lr"]) for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = torch.tensor(rate, dtype=torch.float32)
        try:
            with self._stance():
                return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimiser; the rate stays a number."""
        rate = param_group.get("lr", self.defaults["lr"])
        super().add_param_group(param_group)
        self.param_groups[-1]["lr"] = float(rate)

    def state_dict(self) -> dict[str, Any]:
        """As of any optimiser, of plain tensors: a moment that is not sharded stands as its codes and scales."""
        state = super().state_dict()
        return {**state, "state": {at: dict(_flat(values)) for at, values in state["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` or `in_fp32` gave: each moment in the form that this rank keeps it in."""
        held = {at: dict(_whole(values)) for at, values in state_dict["state"].items()}
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        for name, parameter in zip(names, own, strict=False):  # torch says what is wrong with their number
            if name in held:
                held[name] = {moment: self._fitted(moment, x, parameter) for moment, x in held[name].items()}
        super().load_state_dict({**state_dict, "state": held})

    @staticmethod
    def in_fp32(state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state whose moments are plain fp32 tensors, sharded as they are.

        Blocks of 256 are of what a rank holds, so 8-bit moments cannot be cut otherwise; their numbers can.
        """
        held = {at: {m: _plain(x) for m, x in _whole(values)} for at, values in state_dict["state"].items()}
        return {**state_dict, "state": held}

    def _fitted(self, moment: str, value: Any, parameter: Tensor) -> Any:
        """A moment in 8 bits where this rank keeps it so, in fp32 where it does not; one that is so already as it is."""
        if moment == "step":
            return value
        room = self._new_buffer(parameter, moment == SIGNED)
        if _is_low(room) == _is_low(value):
            return value
        _local(room).copy_(_local(value))
        return room

    def _stance(self) -> AbstractContextManager:
        first = self.param_groups[0]["params"][0]
        return torch.compiler.set_stance("force_eager") if first.device.type == "cpu" else nullcontext()


CODES, SCALES = "_codes", "_scales"
"""What is put behind a moment's name."""
SIGNED = "exp_avg"
"""The moment that has a sign."""


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _is_low(value: Tensor) -> bool:
    return isinstance(_local(value), OptimState8bit)


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor) or not _is_low(value):
        return value
    numbers = _local(value).dequantize()
    if not isinstance(value, DTensor):
        return numbers
    where = (value.device_mesh, value.placements)
    return DTensor.from_local(numbers, *where, run_check=False, shape=value.shape, stride=value.stride())


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, OptimState8bit):
            yield from ((name + CODES, value.codes), (name + SCALES, value.scale))
        else:
            yield name, value


def _whole(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if name.endswith(CODES):
            moment = name.removesuffix(CODES)
            signed = moment == SIGNED
            codes, scales = value.clone(), values[moment + SCALES].clone()
            levels = torch.tensor((get_qmap_unsigned, get_qmap_signed)[signed](), device=codes.device)
            yield moment, OptimState8bit(codes, scales, levels, signed, torch.float32)
        elif not name.endswith(SCALES):
            yield name, value
