"""Which share of a step's rows a process gets: ranks that split one model over tensor parallelism share theirs."""

from typing import Any, TypeVar

__all__ = ["data_place", "over_rows", "replaces_sampler"]

Metric = TypeVar("Metric", bound=Any)


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
