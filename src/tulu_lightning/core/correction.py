"""The sampler is not quite the trainer: how far apart their log-probs are, and a weight that makes up for it.

An engine in another precision, with other kernels or one update behind samples from π_sampler, while the policy loss
takes the samples to be from π_old, the trainer's own policy at the start of the step. The importance weight π_old /
π_sampler of each token, without gradient, multiplied onto its policy loss repairs that; it is held within bounds because
it is unbounded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tulu_lightning.core.kl import LOG_LIMIT, k3
from tulu_lightning.core.settings import require, require_kind

__all__ = ["Correction", "CorrectionKind", "Mismatch"]

CorrectionKind = Literal["truncate", "mask", "none"]


class Mismatch(NamedTuple):
    """Sums over tokens, which add over micro-batches (`plus`) and ranks (`over_ranks`). d = log π_old - log π_sampler."""

    tokens: float = 0.0
    gap: float = 0.0
    """Σ |d|, nats."""
    gap_max: float = 0.0
    kl: float = 0.0
    """Σ of the estimator k3 of KL(π_sampler || π_old), nats."""
    ratio: float = 0.0
    """Σ of π_old / π_sampler as it is, before any bound."""
    ratio_squares: float = 0.0
    weight: float = 0.0
    """Σ of the weight that the loss is multiplied by."""
    clipped: float = 0.0
    """Tokens whose weight is not their ratio: cut down, or 0."""

    def plus(self, other: "Mismatch") -> "Mismatch":
        """Both together."""
        added = Mismatch(*(a + b for a, b in zip(self, other, strict=True)))
        return added._replace(gap_max=max(self.gap_max, other.gap_max))

    def over_ranks(self, reduce_sum: Callable[[Tensor], Tensor], reduce_max: Callable[[Tensor], Tensor]) -> "Mismatch":
        """Those of all ranks together; each function reduces a float64 tensor over the ranks."""
        sums = reduce_sum(torch.tensor(self, dtype=torch.float64)).tolist()
        largest = reduce_max(torch.tensor([self.gap_max], dtype=torch.float64)).tolist()[0]
        return Mismatch(*sums)._replace(gap_max=largest)

    def metrics(self) -> dict[str, float]:
        """What a step logs.

        Returns:
            - `mismatch_mean`, `mismatch_max`: |d|, nats;
            - `mismatch_kl`: k3 of KL(π_sampler || π_old), nats per token;
            - `ess`: effective sample size as a share of the tokens, (Σw)² / (N Σw²) of the unbounded ratios: 1 where
              sampler and trainer agree;
            - `correction_mean`, `correction_clipped`: mean of the applied weights, and share that a bound changed.

            Without tokens, as where both agree.
        """
        n = max(self.tokens, 1.0)
        return {
            "mismatch_mean": self.gap / n,
            "mismatch_max": self.gap_max,
            "mismatch_kl": self.kl / n,
            "ess": self.ratio**2 / (n * self.ratio_squares) if self.tokens else 1.0,
            "correction_mean": self.weight / n if self.tokens else 1.0,
            "correction_clipped": self.clipped / n,
        }


@dataclass(frozen=True)
class Correction:
    """The bounded importance weight w of each token.

    - `truncate`: min(π_old / π_sampler, `cap`): truncated importance sampling (Yao et al. 2025, "Your efficient RL
      framework secretly brings you off-policy RL training").
    - `mask`: the ratio where it lies within [`low`, `high`], else 0, so that the token is not trained on (IcePop, Ling
      team 2025).
    - `none`: 1, as in Tülu 3, which did not read the sampler's log-probs.

    Raises:
        InputError: an unknown kind, a number out of its range, or a setting that the kind does not read.
    """

    kind: CorrectionKind = "truncate"
    cap: float = 2.0
    """Largest weight of `truncate`, 1 or more."""
    low: float = 0.5
    """Smallest ratio that `mask` trains on."""
    high: float = 5.0
    """Largest ratio that `mask` trains on."""

    def __post_init__(self) -> None:
        require_kind(self, "correction", {"truncate": ("cap",), "mask": ("low", "high"), "none": ()})
        require(1 <= self.cap < float("inf"), "correction.cap", self.cap, "It must be 1 or more: 1 is agreement.")
        require(0 <= self.low <= 1, "correction.low", self.low, "It lies between 0 and 1: 1 is agreement.")
        require(1 <= self.high < float("inf"), "correction.high", self.high, "It must be 1 or more: 1 is agreement.")

    @torch.no_grad()
    def __call__(self, old_N: Tensor, sampler_N: Tensor) -> Tensor:
        """weight_N, without gradient.

        Args:
            old_N: log-probs of the sampled tokens under the trainer's policy at the start of the step.
            sampler_N: the sampler's own, at the same temperature.
        """
        return self._weight(_ratio(old_N, sampler_N))

    def _weight(self, ratio_N: Tensor) -> Tensor:
        if self.kind == "truncate":
            return ratio_N.clamp(max=self.cap)
        if self.kind == "mask":
            return torch.where((ratio_N >= self.low) & (ratio_N <= self.high), ratio_N, 0.0)
        return torch.ones_like(ratio_N)

    @torch.no_grad()
    def mismatch(self, old_N: Tensor, sampler_N: Tensor) -> Mismatch:
        """How far sampler and trainer are apart on these tokens, and what the correction does about it."""
        if not old_N.numel():
            return Mismatch()
        ratio_N = _ratio(old_N, sampler_N)
        weight_N = self._weight(ratio_N)
        changed_N = (weight_N != ratio_N) & (self.kind != "none")
        gap_N = (old_N - sampler_N).abs()
        kl_N = k3(sampler_N, old_N)
        columns = (torch.ones_like(gap_N), gap_N, kl_N, ratio_N, ratio_N.double().square(), weight_N, changed_N)
        tokens, gap, kl, ratio, squares, weight, clipped = torch.stack([x.double().sum() for x in columns]).tolist()
        return Mismatch(tokens, gap, float(gap_N.max()), kl, ratio, squares, weight, clipped)


def _ratio(old_N: Tensor, sampler_N: Tensor) -> Tensor:
    return torch.exp((old_N - sampler_N).clamp(-LOG_LIMIT, LOG_LIMIT))
