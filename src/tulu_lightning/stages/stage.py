"""What SFT, DPO, reward modelling and PPO have in common.

One batch of the data module is one global step, already cut into this rank's micro-batches. The stage accumulates
itself: every micro-batch's loss is a *sum*, scaled once by (ranks / the step's global denominator), so neither the
number of micro-batches nor of ranks is seen in the gradient. Steps are counted here: Lightning's `global_step` counts
every `optimizer.step()` of every optimiser.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from tulu_lightning.assets.models import generation_eos, resolve_model
from tulu_lightning.checkpoints.identity import Value, config_digest, flat, weights_digest
from tulu_lightning.core.gradients import accumulating
from tulu_lightning.data import chat
from tulu_lightning.data.base import StepData
from tulu_lightning.data.packed import PackedData
from tulu_lightning.errors import InputError
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.models.limits import check_documents
from tulu_lightning.models.quantize import check_bitsandbytes
from tulu_lightning.models.sharding import Fsdp2, check_integers
from tulu_lightning.ranks import data_place, over_rows
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.stages import saving
from tulu_lightning.stages.checks import check_processes, check_trainer, check_validation, warn_of_bf16_weights
from tulu_lightning.stages.optimizer import AdamW, NonFiniteError, clip, differing, samples

__all__ = ["NonFiniteError", "Stage"]


class Stage(L.LightningModule):
    """Base of the stages: the network, the step counter, and an optimiser step that divides once.

    Attributes:
        step: finished global steps.
        metrics: what the last step logged; callbacks read it.
        samples: rows about the last step for people to read (PPO's rollouts); empty for the others.
    """

    keeps_rows: ClassVar[bool] = False
    """Whether its checkpoints hold numbers about single rows, which are wrong for any others."""
    without_rows: ClassVar[str] = ""  # what would do without them, for a message; begins with a space
    halt: str = ""  # why the run has to stop after the step that just ended; `Checkpoints` saves it first
    speaks: ClassVar[bool] = True
    """Whether what it trains is a language model, which can be sampled from; a reward model cannot."""

    def __init__(self, backbone: Backbone, optimizer: AdamW) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.backbone, self.optimizer = backbone, optimizer
        self.step = 0
        self.skipped: dict[str, int] = {}
        self._skipped_updates = 0
        self._changed = torch.zeros(2, dtype=torch.float64)
        self.metrics: dict[str, float] = {}
        self.samples: list[dict[str, Any]] = []
        self.policy: Any = None
        self.start = str(resolve_model(backbone.path))
        self.folder = os.path.realpath(self.start)  # `promoted` may point elsewhere before the run ends
        self._digests: dict[str, str] = {}

    # Building ---------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build (and under FSDP2 shard) the networks; Lightning calls this once per entry point, so it is guarded."""
        if self.policy is None:
            self.policy = self.placed(self.build, self.backbone)

    def build(self) -> Any:
        """What is trained, whole: the policy, a `PackedLM`, unless the stage has another network."""
        return PackedLM(self.backbone, self.folder)

    def placed(self, build: Callable[[], Any], config: Backbone) -> Any:
        """What `build` makes on its device: whole, or sharded over the strategy's mesh by its backbone's settings.

        Lightning lets a single GPU be the default device meanwhile. Networks are built, checked and filled on the host,
        as on every machine, and moved when they are whole: the host never holds more than one of them.
        """
        strategy: Any = self._strategy()
        if isinstance(strategy, Fsdp2):
            return strategy.placed(build, config)
        with torch.device("cpu"):
            module = build()
        return module if strategy is None else module.to(strategy.root_device)

    def _strategy(self) -> object:
        return self._trainer.strategy if self._trainer is not None else None

    def configure_optimizers(self) -> Any:
        """One fused AdamW over the network. No Lightning scheduler: the rate is a function of our step."""
        return self.optimizer.build(self.model.parameters())

    @property
    def model(self) -> Any:
        """What `build` gives, once `configure_model` has built it."""
        if self.policy is None:
            raise RuntimeError("the model is built when a Trainer starts; call configure_model() to use it before")
        return self.policy

    def make_engine(self, dtype: torch.dtype | None = None) -> LocalEngine:
        """An engine with a copy of the policy's present weights, stamped with the present step."""
        dtype = dtype or getattr(torch, self.backbone.compute_dtype)
        return LocalEngine.from_model(self.model.lm, dtype, self.device, self.step)

    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end a response: those of the data module and of the start checkpoint's generation config."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return chat.stop_ids(data.tokenizer, data.template, (*data.stop_ids, *generation_eos(self.folder)))

    # Steps ------------------------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        """Steps of the run, as the data module plans them."""
        loader = self.trainer.train_dataloader
        if loader is None:
            return self.trainer.datamodule.total_steps  # type: ignore[attr-defined]
        return len(loader)

    @property
    def finished(self) -> bool:
        """Every planned step is done, or as many as `trainer.limit_train_batches` allows."""
        return self.step >= min(self.total_steps, self.trainer.num_training_batches)

    def configure_callbacks(self) -> list[Any]:
        """Adds none: this hook is the only one that comes before Lightning's own checks, which end in a traceback."""
        check_trainer(self.trainer)
        if self.backbone.quantize is not None and isinstance(self.trainer.strategy, Fsdp2):
            check_integers()
        return []

    def check_data(self, data: Any) -> None:
        """Refuse rows that the model cannot read.

        Raises:
            InputError: rows of another kind of stage, a token id outside the vocabulary, or a row with more tokens than
                the model has positions.
        """
        if not isinstance(data, PackedData):
            raise InputError("data", f"is {type(data).__name__}", f"{type(self).__name__} trains on packed documents.")
        for documents in data.document_sets:
            check_documents(documents, self.folder)

    def setup(self, stage: str) -> None:
        """Refuse, before any weights load, what would divide, average or shuffle behind our back."""
        check_processes(self.trainer)
        if self.backbone.quantize is not None:
            check_bitsandbytes()
        if stage == "fit":
            self.optimizer.check_packages()
            warn_of_bf16_weights(self.backbone, self.optimizer.lr)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            what = f"there is none, and {type(self).__name__} asks it for more than batches (rows, sources, steps)"
            raise InputError("data", what, "Give the data module itself: trainer.fit(stage, datamodule=data).")
        if isinstance(data, StepData):
            self.check_data(data)
            if stage == "fit" and getattr(data, "validation", None):
                check_validation(self.trainer, data.total_steps)

    def on_validation_epoch_start(self) -> None:
        """Begin metrics anew, in the mode of this validation: those of `trainer.validate` are inference tensors."""
        for part in self.modules():
            if isinstance(part, Metric):
                over_rows(part, self._trainer).reset()

    def log_validation(self, metrics: Mapping[str, Metric | float]) -> None:
        """Give the metrics of a validation to Lightning, those of torchmetrics to be computed at its end.

        Within a fit not to its logger, whose steps are counted otherwise than ours: `callbacks.records.Records` logs them.
        """
        logger = self.trainer.state.fn != "fit"
        same = any(isinstance(value, float) for value in metrics.values())  # on all ranks, and so is their mean
        self.log_dict(metrics, on_step=False, on_epoch=True, logger=logger, batch_size=1, sync_dist=same)  # type: ignore[arg-type]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Start the step's clock; a trainer that wants more epochs than the plan has gets nothing more."""
        self._started, self._skipped_updates = time.perf_counter(), 0
        self._changed = torch.zeros(2, dtype=torch.float64)
        return -1 if self.finished else None

    def forward(self, pack: Any, *settings: Any) -> Any:
        """What the network says of a pack: log-probs of its scored tokens (`PackedLM`), or rewards (`PackedReward`)."""
        return self.model(pack, *settings)

    def backward_sum(self, loss_sum: Tensor, denominator: float) -> None:
        """Backward of a summed loss, divided once by the global denominator; × ranks undoes gradient averaging."""
        with self.accumulating():
            self.manual_backward(loss_sum * (self.place[1] / denominator))

    def accumulating(self) -> AbstractContextManager[None]:
        """Within this, large gradients are added to `.grad` where they are made (`core.gradients`), but not sharded ones."""
        return accumulating(not isinstance(self._strategy(), Fsdp2))

    def update(
        self, settings: AdamW, optimizer: Any, parameters: Iterable[nn.Parameter], network: str = "policy"
    ) -> float:
        """Clip, set the rate for this step, update, clear. Returns the gradient norm before clipping.

        A non-finite norm skips the update; each network counts its own.

        Raises:
            NonFiniteError: after `max_skipped` such steps in a row.
        """
        parameters = list(parameters)
        norm = clip(parameters, settings.max_grad_norm)
        for group in optimizer.optimizer.param_groups:
            group["lr"] = settings.lr_at(self.step, self.total_steps)
        finite = math.isfinite(norm)
        self.skipped[network] = 0 if finite else self.skipped.get(network, 0) + 1
        self._skipped_updates += not finite
        if finite:
            before = samples(parameters)
            optimizer.step()
            self._changed += differing(before, samples(parameters))
        elif self.skipped[network] >= settings.max_skipped:
            times = f"{settings.max_skipped} updates in a row, up to step {self.step}"
            raise NonFiniteError(f"the {network}'s gradient was not finite for {times}")
        optimizer.zero_grad(set_to_none=True)
        return norm

    def reduce_sum(self, sums: Tensor) -> Tensor:
        """Sum a tensor over the ranks that have different rows; the identity on one process."""
        strategy = self._strategy()
        return strategy.sum_over_rows(sums) if isinstance(strategy, Fsdp2) else sums

    @property
    def place(self) -> tuple[int, int]:
        """This process's rank among those with different rows, and how many those are."""
        return data_place(self._trainer)

    def finish_step(self, metrics: dict[str, float]) -> None:
        """Count the step and publish its metrics (progress bar, callbacks)."""
        self.metrics = {
            **metrics,
            "lr": self.optimizer.lr_at(self.step, self.total_steps),
            "seconds": time.perf_counter() - self._started,
            "skipped_updates": float(self._skipped_updates),
        }
        if self.backbone.weights_dtype == "bfloat16" and self.backbone.lora is None:
            changed, watched = self.reduce_sum(self._changed).tolist()
            self.metrics["weights_changed"] = changed / max(watched, 1)
        self.step += 1
        if self.finished:
            self.trainer.should_stop = True

    # Checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep our own step counter, and what the run is."""
        saving.save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on at the step that was finished; refuses what `stages.saving.restore` refuses."""
        saving.restore(self, checkpoint)

    def identity(self) -> dict[str, Value]:
        """What decides the course of the run, as plain values by name; see `checkpoints.identity`.

        Packing, ranks, saving and logging are not in it: they may change from one start to the next.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        result: dict[str, Value] = {"stage": type(self).__name__, "start weights": self.start_digest}
        result["start config"] = config_digest(self.folder)  # the same weights under another one are another network
        for name in ("compute_dtype", "weights_dtype", "layers", "lora", "quantize"):  # what else it has sets speed
            result |= flat(f"backbone.{name}", getattr(self.backbone, name))
        result |= flat("optimizer", self.optimizer)
        for name, setting in self.settings().items():
            result |= flat(name, setting)
        if isinstance(data, StepData):
            result |= {"data rows": data.digest(), "data.seed": data.seed, "total steps": self.total_steps}
            result["data.examples_per_step"] = data.examples_per_step
        if seed := os.environ.get("PL_GLOBAL_SEED"):
            result["seed_everything"] = int(seed)
        return result

    def settings(self) -> dict[str, Any]:
        """The stage's own part of `identity`: its losses and whatever else changes what is learned."""
        return {}

    @property
    def start_digest(self) -> str:
        """Hash of the start weights."""
        return self.digest_of(self.folder)

    def digest_of(self, folder: str) -> str:
        """Hash of a model folder's weights, read once: they are loaded once, too."""
        if folder not in self._digests:
            self._digests[folder] = weights_digest(folder)
        return self._digests[folder]
