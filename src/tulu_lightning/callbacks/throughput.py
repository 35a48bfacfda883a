"""How fast a run is: tokens a second, the share of the machine's peak that they are worth, and memory."""

import re
import time
from typing import Any, Literal

import lightning as L
import torch
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layers

from tulu_lightning.callbacks.promote import peak_memory_bytes
from tulu_lightning.callbacks.records import Records
from tulu_lightning.core.flops import Shape, Work, pack_work, training_flops
from tulu_lightning.core.matmul import product
from tulu_lightning.errors import InputError
from tulu_lightning.models.quantize import Linear4bit
from tulu_lightning.types import StepBatch

__all__ = ["Throughput", "device_peak", "measured_peak", "model_shape"]

PEAKS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A30": 165e12,
    "A40": 150e12,
    "RTX 6000 Ada": 364e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}
"""FLOP/s of dense bf16 products with fp32 sums, from the makers' data sheets; the first name that fits counts."""
SIZE, TRIALS = 2048, 5


def device_peak(name: str) -> float | None:
    """FLOP/s of a GPU by its name; None for one that is not in the table.

    An RTX A4000 is no A40, and neither a laptop's 4090 nor a 3090 Ti is the card of that number.
    """
    pattern = r"(?<![A-Za-z0-9]){}(?![A-Za-z0-9])(?! (?:Ti|D|Laptop)\b)"
    return next((peak for part, peak in PEAKS.items() if re.search(pattern.format(re.escape(part)), name)), None)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few square matrix products on this device, as the model would make them."""
    a, b = (torch.randn(SIZE, SIZE, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(TRIALS):
        started = time.perf_counter()
        product(a, b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * SIZE**3 / best


def model_shape(model: Any) -> Shape | None:
    """What of a policy costs arithmetic; None where not every weight meets every token (mixtures of experts).

    Args:
        model: a `PackedLM` or `PackedReward`, whole or sharded; the latter's head, one vector, costs next to nothing.
    """
    decoder, head = model.lm.get_decoder(), model.lm.get_output_embeddings()
    config = model.lm.config.get_text_config(decoder=True)
    if any("expert" in name for name, _ in decoder.named_modules()):
        return None
    layers = [part for part in decoder.modules() if isinstance(part, torch.nn.Linear | Conv1D)]
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    trained = sum(_weights(layer) for layer in layers if layer.weight.requires_grad)
    total = sum(map(_weights, layers))
    outputs, head_trained = (0, False) if head is None else (head.weight.numel(), head.weight.requires_grad)
    return Shape(total, trained, outputs, head_trained, width * config.num_hidden_layers)


def _weights(layer: torch.nn.Linear | Conv1D) -> int:
    """Weights of a matrix; in 4 bits its tensor holds codes, two or four to an item."""
    return layer.out_features * layer.in_features if isinstance(layer, Linear4bit) else layer.weight.numel()


class Throughput(L.Callback):
    """Add to each step's metrics, for `Records` (which has to come later in the list) to write:

    - `tokens_per_second`, `trained_tokens_per_second`: over all ranks and the whole step; padding is not counted.
    - `mfu`: model FLOPs (`core.flops`) by what all devices could do in that time. For stages whose step is one pass
      forward and backward (SFT, DPO), where the peak is known.
    - `peak_memory_bytes`: most that this rank's process has held so far: allocated by PyTorch on a GPU, else resident.

    Args:
        peak: FLOP/s of one device. `auto` knows common GPUs (dense bf16) and leaves `mfu` out elsewhere; `measure`
            takes a second at the start for the best of some matrix products in the compute dtype, on CPUs, too.

    Raises:
        InputError: a peak that is not above 0, or `Records` before this callback.
    """

    def __init__(self, peak: float | Literal["auto", "measure"] = "auto") -> None:
        super().__init__()
        if not (peak in ("auto", "measure") or (not isinstance(peak, str) and 0 < peak < float("inf"))):
            raise InputError("Throughput.peak", f"is {peak}", "Use auto, measure, or FLOP/s above 0.")
        self.peak = peak
        self._peak: float | None = None
        self._shape: Shape | None = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Find out before the run, not after, that nothing of this would be recorded."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, Records) for callback in callbacks[: callbacks.index(self)]):
            what = "Records stands before Throughput, so it would write a step before its speed is known"
            raise InputError("callbacks", what, "List Throughput before Records.")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Settle the peak."""
        device = pl_module.device
        if self.peak == "measure":
            self._peak = measured_peak(device, getattr(torch, pl_module.backbone.compute_dtype))
        elif self.peak == "auto":
            self._peak = device_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        else:
            self._peak = float(self.peak)
        self._shape = model_shape(pl_module.model)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the step's numbers."""
        metrics: dict[str, float] = pl_module.metrics
        seconds = metrics["seconds"]
        metrics["tokens_per_second"] = metrics["tokens"] / seconds
        metrics["trained_tokens_per_second"] = metrics["trained_tokens"] / seconds
        if self._peak is not None and self._shape is not None and isinstance(batch, StepBatch):
            works = [pack_work(pack) for pack in batch.packs]
            sums = torch.tensor([sum(column) for column in zip(*works, strict=True)], dtype=torch.float64)
            tokens, scored, pairs = map(int, pl_module.reduce_sum(sums).tolist())
            flops = training_flops(self._shape, Work(tokens, scored, pairs))
            metrics["mfu"] = flops / (seconds * self._peak * trainer.world_size)
        gpu = pl_module.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(pl_module.device) if gpu else peak_memory_bytes()
        metrics["peak_memory_bytes"] = float(memory)
