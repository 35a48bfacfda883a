"""A stage and a data module with the shape of the real ones: dataclass arguments, and a list of them."""

import errno
from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from tulu_lightning.errors import InputError


@dataclass(frozen=True)
class Backbone:
    path: str
    compute_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class AdamW:
    lr: float
    beta1: float = 0.9

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise InputError("optimizer.lr", f"is {self.lr}", "It must be above 0.")


@dataclass(frozen=True)
class Critic:
    optimizer: AdamW
    layers: int | None = None


@dataclass(frozen=True)
class Source:
    path: str
    weight: float = 1.0


class ToyStage(LightningModule):
    built = 0

    def __init__(self, backbone: Backbone, optimizer: AdamW, critic: Critic | None = None, fault: str = "") -> None:
        super().__init__()
        self.save_hyperparameters("fault")
        self.backbone, self.optimizer, self.critic, self.fault = backbone, optimizer, critic, fault
        self.layer = torch.nn.Linear(2, 1)
        self.batches: list[int] = []
        ToyStage.built += 1

    def training_step(self, batch, batch_idx):
        self.batches.append(batch_idx)
        if self.fault == "ctrl-c":
            raise KeyboardInterrupt
        if self.fault == "full":
            try:
                raise OSError(errno.ENOSPC, "No space left on device", "runs/x/step-3.ckpt")
            except OSError as error:
                raise RuntimeError("file write failed") from error
        if self.fault == "bug":
            raise ValueError("a bug of ours")
        return self.layer(batch).mean()

    def test_step(self, batch, batch_idx):
        self.batches.append(batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.optimizer.lr)


class ToyData(LightningDataModule):
    def __init__(self, sources: list[Source], tokenizer: str, micro_tokens: int = 100) -> None:
        super().__init__()
        self.sources, self.tokenizer, self.micro_tokens = sources, tokenizer, micro_tokens

    def train_dataloader(self):
        return DataLoader([torch.ones(2)] * 16, batch_size=2)  # type: ignore[arg-type]

    def test_dataloader(self):
        return self.train_dataloader()


class ToyDataWithoutTokenizer(ToyData):
    def __init__(self, sources: list[Source]) -> None:
        super().__init__(sources, tokenizer="")
