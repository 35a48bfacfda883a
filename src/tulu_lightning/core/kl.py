"""KL(policy || reference) from samples of the policy: as a number, in the reward, and in the loss.

With d = log π - log π_ref at the sampled token (Schulman 2020, "Approximating KL divergence"): k1 = d (unbiased, can be
negative), k2 = d²/2 (biased, positive), k3 = exp(-d) - 1 + d (unbiased, positive).

A good estimate need not make a good loss. Under samples of π, the mean gradient of k1 is 0, and that of k3 is the
gradient of KL(π_ref || π), the other way round; k2's is that of KL(π || π_ref), d ∇log π. So k1 goes into the reward,
where the policy gradient makes d ∇log π of it, and into the loss go k2, or k3 with k2's gradient (`kl_loss`).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tulu_lightning.core.settings import require

__all__ = ["Kl", "KlEstimator", "KlPlace", "adapted", "k1", "k2", "k3", "kl_loss"]

LOG_LIMIT = 20.0
"""Log-ratios are held within ±20 before exp: e^20 is already far outside any healthy run."""
K3_LIMIT = 10.0
"""Largest value of k3: one token far off must not be the whole mean."""

KlEstimator = Literal["k1", "k2", "k3"]
KlPlace = Literal["reward", "loss"]


def k1(logp_N: Tensor, reference_N: Tensor) -> Tensor:
    """log π - log π_ref."""
    return logp_N - reference_N


def k2(logp_N: Tensor, reference_N: Tensor) -> Tensor:
    """(log π - log π_ref)² / 2."""
    return 0.5 * (logp_N - reference_N).square()


def k3(logp_N: Tensor, reference_N: Tensor) -> Tensor:
    """exp(-d) - 1 + d, d = log π - log π_ref within ±20; at most 10."""
    d_N = (logp_N - reference_N).clamp(-LOG_LIMIT, LOG_LIMIT)
    return (torch.exp(-d_N) - 1 + d_N).clamp(-K3_LIMIT, K3_LIMIT)


def kl_loss(
    logp_N: Tensor, reference_N: Tensor, estimator: Literal["k2", "k3"], ratio_N: Tensor | None = None
) -> Tensor:
    """KL per token to add to the loss; on samples of the policy its mean gradient is that of KL(π || π_ref).

    Both have k2's gradient, d ∇log π. They differ in the value that is reported: k2's own, or k3's ("straight-through").
    The plain k3 of DeepSeek's GRPO and of Tülu 3.1 has the gradient (1 - exp(-d)) ∇log π instead, which agrees near d = 0.
    Once the policy has moved away from the one that sampled, the mean is that of the KL only with `ratio_N`; then k3 is
    the loss of DeepSeek-V3.2 (arXiv 2512.02556) and the default of TRL 1.16, in value and gradient.

    Args:
        logp_N: log-probs of the sampled tokens now, with gradient.
        reference_N: the same under the reference.
        estimator: `k2` or `k3`.
        ratio_N: π / π_old of the samples, multiplied onto the loss without gradient; 1 if left out.

    Returns:
        loss_N, to be multiplied by the coefficient.

    Raises:
        InputError: `k1`: as a loss it has no gradient on average.
    """
    require(estimator in ("k2", "k3"), "kl.estimator", repr(estimator), "In the loss, use 'k2' or 'k3'.")
    loss_N = k2(logp_N, reference_N)
    if estimator == "k3":
        loss_N = k3(logp_N.detach(), reference_N.detach()) + (loss_N - loss_N.detach())
    return loss_N if ratio_N is None else ratio_N.detach() * loss_N


@dataclass(frozen=True)
class Kl:
    """How the policy is held near the reference. The defaults are Tülu 3's 8B run: β = 0.05, k1 in the reward.

    Raises:
        InputError: settings that clash or would do nothing.
    """

    coefficient: float = 0.05
    """β, in units of the reward per nat. 0 is none, and then no reference model is needed."""
    place: KlPlace = "reward"
    """`reward`: -β k1 on every token, before advantages are made. `loss`: β times `kl_loss`, added per token."""
    estimator: KlEstimator = "k1"
    """`k1` in the reward; `k2` or `k3` in the loss."""
    target: float | None = None
    """Adapt β until the KL of a response (sum of k1 over its tokens, in nats) is this; null keeps β."""
    horizon: int = 10_000
    """Responses over which β moves by about the relative error; read with `target` only."""

    def __post_init__(self) -> None:
        remedy = "It must be 0 or more, and finite."
        require(0 <= self.coefficient < float("inf"), "kl.coefficient", self.coefficient, remedy)
        require(self.place in ("reward", "loss"), "kl.place", repr(self.place), "Use 'reward' or 'loss'.")
        known = self.estimator in ("k1", "k2", "k3")
        require(known, "kl.estimator", repr(self.estimator), "Use 'k1', 'k2' or 'k3'.")
        require(self.horizon >= 1, "kl.horizon", self.horizon, "It counts responses: use at least 1.")
        self._require_a_right_gradient()
        self._require_effect()

    def _require_a_right_gradient(self) -> None:
        if self.place == "reward":
            remedy = "Use k1: as a reward, k2 and k3 do not lead to the gradient of the KL. Or kl.place: loss."
            require(self.estimator == "k1", "kl.estimator", f"{self.estimator} in the reward", remedy)
        else:
            remedy = "Use k2 or k3: as a loss, k1 has a mean gradient of 0. Or kl.place: reward."
            require(self.estimator != "k1", "kl.estimator", f"{self.estimator} in the loss", remedy)

    def _require_effect(self) -> None:
        if self.target is None:
            remedy = "It does nothing without kl.target: set that, or leave the horizon at 10000."
            require(self.horizon == 10_000, "kl.horizon", self.horizon, remedy)
            return
        require(0 < self.target < float("inf"), "kl.target", self.target, "It must be above 0, in nats per response.")
        remedy = "kl.target only multiplies it: start from a coefficient above 0."
        require(self.coefficient > 0, "kl.coefficient", self.coefficient, remedy)


def adapted(coefficient: float, measured_kl: float, responses: int, kl: Kl) -> float:
    """β for the next step (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    `β (1 + clip(KL / target - 1, ±0.2) · responses / horizon)`. The paper's gain per batch is `responses / horizon` in
    its code, so that the pace does not depend on the batch; it is held at 1, a fifth of β in one step.

    Args:
        coefficient: β of this step.
        measured_kl: mean over the step's responses of the sum of k1 over their tokens, in nats.
        responses: number of responses behind it, over all ranks.
        kl: target and horizon.

    Returns:
        The new β; the old one without a target, and where the measured KL is not a finite number.

    Example: β 0.1, KL 12 of target 6, 500 responses, horizon 10,000: 0.1 · (1 + 0.2 · 0.05) = 0.101.
    """
    if kl.target is None or not math.isfinite(measured_kl):
        return coefficient
    error = min(max(measured_kl / kl.target - 1, -0.2), 0.2)
    return coefficient * (1 + error * min(responses / kl.horizon, 1.0))
