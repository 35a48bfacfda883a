"""A weighted mean over the passes and ranks of a validation."""

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["Mean"]


class Mean(Metric):
    """Mean of numbers with weights, in which a NaN shows.

    torchmetrics' own MeanMetric leaves NaN out, so the mean of the rest would pass for that of all; told not to look for
    NaN (`disable`), it forgets the weights (1.9.0).
    """

    full_state_update = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, value_B: Tensor, weight_B: Tensor | float = 1.0) -> None:
        """Count some numbers; one weight may be of all of them."""
        value_B = value_B.detach().to(self.sums)
        weight_B = torch.as_tensor(weight_B).detach().to(self.sums).expand(value_B.shape)
        self.sums += torch.stack([(value_B * weight_B).sum(), weight_B.sum()])

    def compute(self) -> Tensor:
        """The mean; NaN of nothing."""
        return self.sums[0] / self.sums[1]
