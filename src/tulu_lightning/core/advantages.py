"""From scores to advantages: per-token rewards, generalised advantage estimation, whitening.

Everything is ragged: the tokens of all responses lie end to end on one axis N and `lengths_R` says where they end.
There is no padding, so none can leak in.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Moments", "explained_variance", "gae", "moments", "response_rewards", "token_rewards", "whiten"]


def token_rewards(
    scores_R: Tensor, logp_N: Tensor, reference_N: Tensor, lengths_R: Sequence[int], kl_coefficient: float
) -> Tensor:
    """PPO's reward per token: a k1 penalty on every token, the score on the last (Tülu 3, eq. 7-8 and section 6.2).

    `r_t = -β (log π_old - log π_ref)`, and the response's score is added at its last token: the stop token where
    there is one. Tülu 3's script puts it one position later where there is room; with γ = 1 that changes GAE's last
    step only.

    Args:
        scores_R: one score per response.
        logp_N: log-probs of the sampled tokens under the policy that made them (the trainer's own).
        reference_N: the same under the reference.
        lengths_R: tokens of each response; they add up to N, and none is 0.
        kl_coefficient: β.

    Returns:
        rewards_N.

    Raises:
        ValueError: a response has no token, so that its score would land on another's.
    """
    if not all(lengths_R):
        raise ValueError("a response has no token: it has to leave the batch before")
    rewards_N = -kl_coefficient * (logp_N - reference_N)
    last_R = torch.as_tensor(lengths_R).cumsum(0).to(scores_R.device) - 1
    return rewards_N.index_add(0, last_R, scores_R.to(rewards_N.dtype))


def response_rewards(
    scores_R: Tensor, logp_N: Tensor, reference_N: Tensor, lengths_R: Sequence[int], kl_coefficient: float
) -> Tensor:
    """The same reward per response: its score less β times the sum of k1 over its tokens, for rules without a critic.

    Args:
        scores_R: one score per response.
        logp_N: log-probs of the sampled tokens under the policy that made them (the trainer's own).
        reference_N: the same under the reference.
        lengths_R: tokens of each response.
        kl_coefficient: β.

    Returns:
        rewards_R.
    """
    kl_R = torch.stack([kl_L.sum() for kl_L in (logp_N - reference_N).split(list(lengths_R))])
    return scores_R - kl_coefficient * kl_R.to(scores_R.dtype)


def gae(
    rewards_N: Tensor,
    values_N: Tensor,
    lengths_R: Sequence[int],
    gamma: float = 1.0,
    lam: float = 0.95,
    mask_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), backwards over each response.

    `δ_t = r_t + γ V_{t+1} - V_t`, `A_t = δ_t + γ λ A_{t+1}`; after the last token both V and A are 0, for a response
    that stopped and for one that was cut alike (all peers do so; a cut response carries its penalty in the score).

    Args:
        rewards_N: reward of each token.
        values_N: V of the state *before* each token is chosen.
        lengths_R: tokens of each response.
        gamma: discount γ.
        lam: λ.
        mask_N: bool, the tokens that the policy chose; all if left out. V and A are carried across the others as if they
            were not there. Nothing at those is read: not the critic's value, and no reward either.

    Returns:
        advantages_N and returns_N = advantages + values, both before any whitening; 0 where the mask is false. fp32, or
        fp64 where the rewards are.

    Example: one response, rewards [0, 1], values [0.5, 0.5], γ = λ = 1: δ = [0, 0.5], A = [0.5, 0.5], returns [1, 1].
    """
    if mask_N is not None:
        return _gae_of_chosen(rewards_N, values_N, lengths_R, gamma, lam, mask_N.bool())
    dtype = torch.float64 if rewards_N.dtype == torch.float64 else torch.float32
    rewards, values = (_rows(x_N.to(dtype), lengths_R) for x_N in (rewards_N, values_N))
    carry_R = torch.zeros(len(lengths_R), dtype=dtype, device=rewards_N.device)
    next_R = torch.zeros_like(carry_R)
    advantages = torch.zeros_like(rewards)
    inside = _inside(lengths_R, rewards_N.device)
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta_R = rewards[:, t] + gamma * next_R - values[:, t]
        # Past a response's end nothing is carried: the first real token seen from behind starts from 0.
        carry_R = torch.where(inside[:, t], delta_R + gamma * lam * carry_R, 0.0)
        next_R = torch.where(inside[:, t], values[:, t], 0.0)
        advantages[:, t] = carry_R
    advantages_N = advantages[inside]
    return advantages_N, advantages_N + values_N.to(dtype)


def _gae_of_chosen(
    rewards_N: Tensor, values_N: Tensor, lengths_R: Sequence[int], gamma: float, lam: float, mask_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Carrying across a token is leaving it out: the ragged layout has no place that would have to stay."""
    chosen_R = [int(part_L.sum()) for part_L in mask_N.split(list(lengths_R))]
    if not any(chosen_R):
        zero_N = torch.zeros_like(rewards_N, dtype=torch.promote_types(rewards_N.dtype, torch.float32))
        return zero_N, zero_N.clone()
    short = gae(rewards_N[mask_N], values_N[mask_N], chosen_R, gamma, lam)
    advantages_N, returns_N = (
        torch.zeros(mask_N.shape, dtype=x.dtype, device=x.device).masked_scatter(mask_N, x) for x in short
    )
    return advantages_N, returns_N


def _inside(lengths_R: Sequence[int], device: torch.device) -> Tensor:
    lengths = torch.as_tensor(lengths_R, device=device)
    return torch.arange(int(lengths.max()), device=device)[None] < lengths[:, None]


def _rows(x_N: Tensor, lengths_R: Sequence[int]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(x_N.split(list(lengths_R))), batch_first=True)


class Moments(NamedTuple):
    """Mean, standard deviation and count of all tokens of the global batch."""

    mean: float
    std: float
    tokens: int


def moments(x_N: Tensor, reduce_sum: Callable[[Tensor], Tensor] = lambda sums: sums) -> Moments:
    """Mean and (Bessel-corrected) deviation over all ranks' tokens from two all-reduces of small sums.

    The sum of squares is taken about the global mean: sums of raw squares lose the deviation of large values.

    Args:
        x_N: this rank's tokens.
        reduce_sum: sums a float64 tensor over ranks; the identity on one process.
    """
    x_N = x_N.double()
    count, total = reduce_sum(torch.stack([x_N.new_tensor(float(x_N.numel())), x_N.sum()])).tolist()
    mean = total / max(count, 1)
    squares = float(reduce_sum((x_N - mean).square().sum()[None]))
    return Moments(mean, (squares / max(count - 1, 1)) ** 0.5, int(count))


def whiten(x_N: Tensor, over: Moments) -> Tensor:
    """Subtract the mean and divide by the deviation; left as it is with fewer than two tokens or no spread.

    Advantages only; returns are never whitened. Over the *global* batch, so the number of ranks does not matter
    (Tülu 3's script did it per rank).
    """
    if over.tokens < 2 or over.std < 1e-8:
        return x_N
    return (x_N - over.mean) / (over.std + 1e-8)


def explained_variance(values_N: Tensor, returns_N: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns); 1 is a perfect critic, 0 one that knows the mean only.

    0 when the returns do not vary.
    """
    spread = returns_N.double().var(unbiased=False)
    if returns_N.numel() == 0 or spread < 1e-12:
        return 0.0
    return float(1 - (returns_N - values_N).double().var(unbiased=False) / spread)
