"""Per-token estimators of KL(policy || reference) from samples of the policy (Schulman, "Approximating KL divergence").

With d = log π - log π_ref at the sampled token: k1 = d (unbiased, can be negative), k2 = d²/2 (biased, positive),
k3 = exp(-d) - 1 + d (unbiased, positive). k1 goes into PPO's reward; none of them is a loss as it stands: the gradient
of k1 or k3 is not that of the KL.
"""

import torch
from torch import Tensor

__all__ = ["k1", "k2", "k3"]

LOG_LIMIT = 20.0
"""Log-ratios are held within ±20 before exp: e^20 is already far outside any healthy run."""


def k1(logp_N: Tensor, reference_N: Tensor) -> Tensor:
    """log π - log π_ref."""
    return logp_N - reference_N


def k2(logp_N: Tensor, reference_N: Tensor) -> Tensor:
    """(log π - log π_ref)² / 2."""
    return 0.5 * (logp_N - reference_N).square()


def k3(logp_N: Tensor, reference_N: Tensor) -> Tensor:
    """exp(-d) - 1 + d, d = log π - log π_ref."""
    d_N = (logp_N - reference_N).clamp(-LOG_LIMIT, LOG_LIMIT)
    return torch.exp(-d_N) - 1 + d_N
