"""Short runs of the real stages on the tiny model."""

from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch

from tulu_lightning.assets.arithmetic import prompt_rows
from tulu_lightning.callbacks.checkpoints import Checkpoints
from tulu_lightning.callbacks.records import Records
from tulu_lightning.callbacks.refresh import RolloutRefresh
from tulu_lightning.core.groups import GRPO
from tulu_lightning.core.kl import Kl
from tulu_lightning.core.overlong import Overlong
from tulu_lightning.core.preference import DPO as DPOLoss
from tulu_lightning.data.preference import PreferenceData
from tulu_lightning.data.prompts import PromptData
from tulu_lightning.data.sft import SFTData
from tulu_lightning.data.sources import Source
from tulu_lightning.models.backbone import Backbone
from tulu_lightning.stages.dpo import DPO
from tulu_lightning.stages.optimizer import AdamW
from tulu_lightning.stages.ppo import PPO, Critic, Rollout
from tulu_lightning.stages.reward import RewardModel
from tulu_lightning.stages.sft import SFT
from tulu_lightning.types import Verdict
from tulu_lightning.verifiers.registry import VERIFIERS

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = "tiny-random-llama"
ROWS = "tulu_lightning.assets.arithmetic."


def settings(**changes):
    common = {"tokenizer": TINY, "template": "tulu", "max_tokens": 256, "examples_per_step": 8}
    return {**common, **changes}


def sft_data(**changes):
    rows = Source("sums", rows=ROWS + "sft_rows", args={"count": 40})
    return SFTData(**settings(**{"sources": [rows], "micro_tokens": 256, **changes}))


def preference_data(**changes):
    rows = Source("sums", rows=ROWS + "pair_rows", args={"count": 40})
    return PreferenceData(**settings(**{"sources": [rows], "micro_tokens": 256, **changes}))


def prompt_data(**changes):
    rows = Source("sums", rows=ROWS + "prompt_rows", args={"count": 40})
    return PromptData(**settings(**{"sources": [rows], "examples_per_step": 4, **changes}))


@dataclass(frozen=True)
class EvenBytes:
    """Score: share of the response's bytes that are even; even random weights get different ones."""

    runs = "here"

    def __call__(self, response, target):
        data = response.encode("utf-8", "surrogatepass")
        score = sum(byte % 2 == 0 for byte in data) / max(len(data), 1)
        return Verdict("right" if score > 0.5 else "wrong", score)

    def complaint(self, target):
        return None


VERIFIERS["even_bytes"] = EvenBytes()


def even_rows(count):
    """Sums whose responses are scored by their bytes."""
    return [{**row, "verifier": "even_bytes"} for row in prompt_rows(count)]


def even_data(**changes):
    return prompt_data(**{"sources": [Source("even", rows="stage_runs.even_rows", args={"count": 40})], **changes})


def sft(**optimizer):
    return SFT(Backbone(TINY), AdamW(**{"lr": 1e-3, **optimizer}))


def dpo(**optimizer):
    return DPO(Backbone(TINY), AdamW(**{"lr": 1e-4, **optimizer}), DPOLoss())


def reward(**optimizer):
    return RewardModel(Backbone(TINY), AdamW(**{"lr": 1e-3, **optimizer}))


def ppo(kind=PPO, path=TINY, **changes):
    common = {
        "optimizer": AdamW(lr=1e-4),
        "critic": Critic(AdamW(lr=1e-3), layers=2),
        "rollout": Rollout(max_new_tokens=6, samples_per_prompt=3),
        "epochs": 2,
        "micro_tokens": 256,
    }
    return kind(Backbone(path), **{**common, **changes})


def grpo(kind=PPO, **changes):
    common = {
        "optimizer": AdamW(lr=1e-4),
        "advantage": GRPO(),
        "rollout": Rollout(max_new_tokens=6, samples_per_prompt=4),
        "overlong": Overlong(kind="none"),
        "kl": Kl(coefficient=0.01, place="loss", estimator="k3"),
        "epochs": 1,
        "mini_batches": 2,
        "micro_tokens": 256,
    }
    return kind(Backbone(TINY), **{**common, **changes})


STAGES = {
    "sft": (sft, sft_data),
    "dpo": (dpo, preference_data),
    "reward": (reward, preference_data),
    "ppo": (ppo, prompt_data),
    "grpo": (grpo, even_data),
}


def weights(stage):
    return {name: tensor.detach().clone() for name, tensor in stage.state_dict().items()}


class Watch(L.Callback):
    """Keeps each step's metrics and rows, the start weights, and the gradients that each optimiser first met."""

    def __init__(self):
        self.history, self.rows, self.gradients, self.start = [], [], {}, {}

    def on_train_start(self, trainer, pl_module):
        self.start = weights(pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append(getattr(batch, "rows", None))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                self.gradients.setdefault(name, parameter.grad.clone())

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.history.append(dict(pl_module.metrics))


def fit(stage, data, folder, ckpt_path=None, callbacks=(), every_n_steps=0, refresh=True, first=(), **trainer):
    """Train to the end of the data module's plan; returns what was watched. The stage is trained in place.

    `first` are callbacks that come before `Records`; what else is given goes to the trainer.
    """
    torch.manual_seed(0)
    watch = Watch()
    refreshing = [RolloutRefresh()] if isinstance(stage, PPO) and refresh else []
    settings = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "callbacks": [*first, Records(), *refreshing, watch, *callbacks, Checkpoints(every_n_steps, keep=9)],
    }
    L.Trainer(**{**settings, **trainer}).fit(stage, data, ckpt_path=ckpt_path)
    return watch
