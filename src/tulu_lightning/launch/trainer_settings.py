"""Trainer settings that no stage can run with, refused by name before Lightning asks for a package or a GPU for them."""

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from tulu_lightning.errors import InputError, nearest

__all__ = ["check_trainer_settings"]

PRECISIONS = (None, "32-true", "32", 32)
FOREIGN = ("fsdp", "deepspeed", "model_parallel", "xla")
"""Strategies of Lightning's, or the beginnings of their names, that shard or count in ways of their own."""


def check_trainer_settings(settings: Any) -> None:
    """Refuse a precision or a strategy that Lightning would first install things for, or build groups of ranks with.

    Args:
        settings: the config's `trainer`.

    Raises:
        InputError: it has one.
    """
    precision, strategy = settings.get("precision"), settings.get("strategy")
    if precision not in PRECISIONS:
        remedy = "Leave it at 32-true; model.init_args.backbone.compute_dtype sets that of the matrix products."
        raise InputError("trainer.precision", f"is {precision}", remedy)
    if not isinstance(strategy, str) or strategy in ("auto", "fsdp2"):
        return
    if strategy not in StrategyRegistry.available_strategies():
        raise InputError("trainer.strategy", f"there is no {strategy!r}", nearest(strategy, ["auto", "fsdp2"]))
    if any(strategy == name or strategy.startswith(f"{name}_") for name in FOREIGN):
        what = f"is {strategy}, which shards and counts in ways of its own"
        remedy = "Use fsdp2, which every stage runs under, on one process or many; or auto, on one."
        raise InputError("trainer.strategy", what, remedy)
