"""Trainer settings that would divide, average, shuffle or count behind a stage's back, refused before weights load."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from tulu_lightning.assets.models import load_tokenizer
from tulu_lightning.core.reduce import PAIR
from tulu_lightning.data.keys import tokenizer_digest
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.models.sharding import Fsdp2
from tulu_lightning.ranks import check_launched, replaces_sampler

__all__ = [
    "check_pairs",
    "check_processes",
    "check_tokenizer",
    "check_trainer",
    "check_validation",
    "reopen_epoch",
    "warn_of_bf16_weights",
]

SMALL_RATE = 1e-5
"""bf16 keeps 8 binary digits: a weight between 2^-8 and 2^-7 (0.004 to 0.008) has neighbours 2^-15 apart, and moves
only by updates of more than half that, 1.5e-5. Adam's are about the learning rate. Weights with a standard deviation of
0.02, as is usual, are larger than 0.004 in five of six cases."""


def check_trainer(trainer: Any) -> None:
    """Refuse settings of the Trainer that have their place elsewhere.

    Raises:
        InputError: another precision than 32-true, Lightning's clipping or accumulation, a strategy that is not ours for
            several processes, or other processes than were started.
    """
    _check_strategy(trainer)
    check_launched(trainer.num_devices, trainer.num_nodes)
    if trainer.precision != "32-true":
        raise InputError(
            "trainer.precision",
            f"is {trainer.precision}",
            "Leave it at 32-true; model.init_args.backbone.compute_dtype sets that of the matrix products.",
        )
    if trainer.gradient_clip_val:
        raise InputError(
            "trainer.gradient_clip_val",
            f"is {trainer.gradient_clip_val}",
            "Leave it out and set model.init_args.optimizer.max_grad_norm.",
        )
    if trainer.accumulate_grad_batches != 1:
        raise InputError(
            "trainer.accumulate_grad_batches",
            f"is {trainer.accumulate_grad_batches}",
            "Leave it at 1: a batch is a whole step here, cut by data.micro_tokens.",
        )


def check_validation(trainer: Any, total_steps: int) -> None:
    """Refuse an interval between validations that the run does not reach; Lightning ends in a traceback there.

    Raises:
        InputError: it is longer than the run.
    """
    interval = trainer.val_check_interval
    if isinstance(interval, int) and interval > total_steps and trainer.check_val_every_n_epoch is not None:
        remedy = "Use at most that, or leave it out to validate once, at the end."
        raise InputError("trainer.val_check_interval", f"is {interval}, and the run has {total_steps} steps", remedy)


def check_processes(trainer: Any) -> None:
    """Refuse what would average or shuffle over several processes, or count steps otherwise.

    Raises:
        InputError: a strategy that is not ours, `fast_dev_run`, `overfit_batches`, `max_steps`, or Lightning's sampler.
    """
    _check_strategy(trainer)
    if getattr(trainer, "fast_dev_run", False):
        remedy = "Use data.init_args.max_steps=1 (or limit_train_batches) for a trial of one step."
        raise InputError(
            "trainer.fast_dev_run", "is set, and would leave out checkpoints, loggers and our steps", remedy
        )
    if trainer.overfit_batches:
        what = f"is {trainer.overfit_batches}, and Lightning would put a sampler of its own in place of the step plan"
        remedy = "Give fewer rows (a source's limit) and more data.init_args.epochs; they come again in each."
        raise InputError("trainer.overfit_batches", what, remedy)
    if trainer.max_steps != -1:
        raise InputError(
            "trainer.max_steps",
            f"is {trainer.max_steps}, and Lightning counts every call of every optimiser there",
            "Use data.init_args.max_steps, which counts whole steps.",
        )
    if replaces_sampler(trainer):
        raise InputError(
            "trainer.use_distributed_sampler",
            "is true",
            "Set it to false: Lightning would replace the step plan by a shuffling sampler.",
        )


def _check_strategy(trainer: Any) -> None:
    if trainer.world_size > 1 and not isinstance(trainer.strategy, Fsdp2):
        raise InputError(
            "trainer.strategy",
            f"is {type(trainer.strategy).__name__} with {trainer.world_size} processes",
            "Use fsdp2: any other would average micro-batches that this package sums.",
        )


def check_tokenizer(data: Any, start: str) -> None:
    """Refuse rows that were tokenised otherwise than the start checkpoint reads them.

    Args:
        data: the data module, set up.
        start: the start checkpoint's folder or name.

    Raises:
        InputError: the two tokenizers differ in anything that decides a token id.
    """
    if tokenizer_digest(load_tokenizer(start)) != data.tokenizer_digest:
        given = data.manifest()["settings"]["tokenizer"]
        what = f"the rows were tokenised with that of {given}, and the start checkpoint {start} has another one"
        raise InputError("data.tokenizer", what, "Leave it out, and the rows are read with the start checkpoint's.")


def check_pairs(data: Any) -> None:
    """Refuse documents that are not pairs: a common start and two continuations.

    Raises:
        InputError: some are not.
    """
    for documents in data.document_sets:
        for part, store in zip(documents.sources, documents.stores, strict=True):
            if store.summary.segments != PAIR * store.summary.rows:
                what = f"the rows of source {part.name!r} are not pairs of a chosen and a rejected answer"
                raise InputError("data", what, "Use tulu_lightning.data.preference.PreferenceData.")


def warn_of_bf16_weights(backbone: Backbone, lr: float) -> None:
    """Say aloud that a small learning rate leaves most bf16-stored weights where they are."""
    if backbone.weights_dtype == "bfloat16" and backbone.lora is None and lr < SMALL_RATE:
        rank_zero_warn(
            f"WEIGHTS STORED IN BFLOAT16 WILL HARDLY TRAIN at a learning rate of {lr:g}: an update is smaller than half "
            "the distance to a weight's neighbour, so most of them round away, and Adam's second moment stands still "
            "for the same reason. Watch `weights_changed`, or set backbone.weights_dtype to float32."
        )


def reopen_epoch(checkpoint: dict[str, Any]) -> None:
    """Let Lightning go on within its only epoch: after `limit_train_batches` it holds it for finished, and would do nothing.

    Whether anything is left to do is ours to say (`finished`).
    """
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    if progress:
        progress["is_last_batch"] = False
