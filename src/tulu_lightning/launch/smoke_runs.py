"""The runs of the smoke step: SFT, and GRPO with its engine and a verifier, on a random Llama of two narrow layers."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from tulu_lightning.assets.tiny import NAME
from tulu_lightning.core.groups import GRPO
from tulu_lightning.core.kl import Kl
from tulu_lightning.data.prompt_source import PromptSource
from tulu_lightning.data.prompts import PromptData
from tulu_lightning.data.sft import SFTData
from tulu_lightning.data.sources import Source
from tulu_lightning.launch.quiet import without_noise
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.ppo import PPO, Rollout
from tulu_lightning.stages.sft import SFT

__all__ = ["RUNS"]

ROWS = "tulu_lightning.assets.arithmetic."
DATA: dict[str, Any] = {"tokenizer": NAME, "template": "tulu", "max_tokens": 256}
Result = tuple[str, str, dict[str, float]]


def sft(folder: str) -> Result:
    """Two steps of SFT. Returns the device, what was done in words, and the last step's metrics."""
    rows = Source("sums", rows=ROWS + "sft_rows", args={"count": 16})
    data = SFTData(sources=[rows], examples_per_step=8, max_steps=2, micro_tokens=256, **DATA)
    stage = SFT(Backbone(NAME), AdamW(lr=1e-3))
    device = _fit(stage, data, folder)
    return device, f"{stage.step} steps, loss {stage.metrics['loss']:.2f}", stage.metrics


def grpo(folder: str) -> Result:
    """One step of GRPO: sample, verify, learn."""
    rows = PromptSource("sums", rows=ROWS + "prompt_rows", args={"count": 4})
    data = PromptData(sources=[rows], examples_per_step=4, max_steps=1, **DATA)
    stage = PPO(
        Backbone(NAME),
        AdamW(lr=1e-4),
        advantage=GRPO(),
        rollout=Rollout(max_new_tokens=8, samples_per_prompt=2),
        kl=Kl(coefficient=0.01, place="loss", estimator="k3"),
        epochs=1,
        micro_tokens=256,
    )
    device = _fit(stage, data, folder)
    return device, "sampled, verified and learned from 8 responses", stage.metrics


def _fit(stage: Any, data: Any, folder: str) -> str:
    """Train; returns the device."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with without_noise(), warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        L.seed_everything(1, verbose=False)
        trainer = L.Trainer(
            accelerator="auto",
            devices=1,
            max_epochs=1,
            default_root_dir=Path(folder),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(stage, datamodule=data)
    return str(trainer.strategy.root_device)


RUNS: dict[str, Callable[[str], Result]] = {"SFT": sft, "GRPO": grpo}
