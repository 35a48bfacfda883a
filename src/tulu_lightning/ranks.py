"""How many processes there are, and which share of a step's rows each gets: those that split one model share theirs."""

import os
from typing import Any, TypeVar

from tulu_lightning.errors import InputError

__all__ = ["check_launched", "data_place", "over_rows", "replaces_sampler"]

Metric = TypeVar("Metric", bound=Any)


def check_launched(devices: int, nodes: int) -> None:
    """Refuse another number of processes than torchrun has started.

    Args:
        devices: processes on each machine, `trainer.devices`.
        nodes: machines, `trainer.num_nodes`.

    Raises:
        InputError: the product is not torchrun's world size.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or (launched := int(os.environ["WORLD_SIZE"])) == devices * nodes:
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", launched))
    what = f"{nodes} x {devices} = {devices * nodes} processes, and torchrun started {launched}, {here} of them here"
    remedy = f"Set trainer.num_nodes to {launched // here} and trainer.devices to {here}"
    if launched % here:
        remedy = "Start as many on each machine"
    raise InputError("trainer.num_nodes x trainer.devices", f"is {what}", f"{remedy}, or start others.")


def data_place(trainer: Any) -> tuple[int, int]:
    """This process's place among those that get different rows, and how many such places there are.

    Args:
        trainer: a Lightning Trainer; None is one process.

    Returns:
        (rank, number of ranks). With tensor parallelism these are smaller than the trainer's own two.
    """
    if trainer is None:
        return 0, 1
    place = trainer.distributed_sampler_kwargs or {}
    return place.get("rank", 0), place.get("num_replicas", 1)


def over_rows(metric: Metric, trainer: Any) -> Metric:
    """A torchmetrics metric that is summed over ranks with different rows alone; by default each rank counts.

    Args:
        metric: is changed.
        trainer: a Lightning Trainer, or None.
    """
    mesh = getattr(getattr(trainer, "strategy", None), "_device_mesh", None)
    if mesh is not None:
        metric.process_group = mesh["data_parallel"].get_group()
    return metric


def replaces_sampler(trainer: Any) -> bool:
    """Whether Lightning would put a sampler of its own in place of the step plan; it may on one process too.

    Args:
        trainer: a Lightning Trainer, or None.
    """
    connector = getattr(trainer, "_accelerator_connector", None)
    return connector is not None and connector.use_distributed_sampler and connector.is_distributed
