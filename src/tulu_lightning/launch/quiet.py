"""Keeps what says nothing about the run out of a command's output."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

__all__ = ["without_noise"]

LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "lightning.fabric.utilities.seed",
)
MESSAGES = (
    "💡",  # advertisements
    "GPU available: False",
    "TPU available: False",
    "Seed set to",  # it stands in the saved config
    "`weights_only` was not set",  # checkpoints are our own
    "`Trainer.fit` stopped: `max_epochs",  # every run is one Lightning epoch
    "Restoring states from",  # we say it ourselves, with the step
    "Restored all states",
)
WARNINGS = (
    r"\s*``instantiate_classes`` was deprecated",
    r"\s*By default only one Jsonarg",
    r"`isinstance\(treespec",
    r"You defined a `validation_step` but have no",  # held-out prompts are scored by a callback
    r".*does not have many workers",  # rows are tokenised before the first step; a batch is a few tensor copies
)


@contextmanager
def without_noise() -> Iterator[None]:
    """Leave out Lightning's advertisements, what it says of every run alike, and deprecations between its parts.

    A GPU that is there is still announced, and so is anything unexpected.
    """

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not any(part in text for part in MESSAGES)

    with ExitStack() as stack, warnings.catch_warnings():
        for name in LOGGERS:
            logger = logging.getLogger(name)
            logger.addFilter(keep)
            stack.callback(logger.removeFilter, keep)
        for text in WARNINGS:
            warnings.filterwarnings("ignore", message=text)
        yield
