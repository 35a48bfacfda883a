"""Preference losses: from summed log-probs of chosen and rejected answers to a loss per pair.

A loss takes plain sums and token counts, so that length normalisation is a visible term of its formula and the
reference log-probs do not depend on which loss reads them. It returns one number per pair and averages nothing: the
stage sums and divides once, by the pairs of the whole step.

In the formulas c and r are the chosen and the rejected answer, |y| the number of scored tokens of an answer, and
d(y) = log π(y) - log π_ref(y) its log-ratio in nats, divided by |y| where `length_normalised`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tulu_lightning.core.pairs import Pair
from tulu_lightning.core.settings import require

__all__ = [
    "DPO",
    "IPO",
    "WPO",
    "ConservativeDPO",
    "Pair",
    "PairLoss",
    "PreferenceLoss",
    "SimPO",
    "pair_metrics",
    "reward_metrics",
]


class PairLoss(NamedTuple):
    """What a preference loss says of each pair; the caller sums and divides once, by the step's pairs."""

    loss_B: Tensor
    rewards: Pair
    """Implicit rewards, detached."""


class PreferenceLoss(ABC):
    """What every preference loss is: a frozen dataclass whose fields are its settings and whose call is its formula."""

    needs_reference: ClassVar[bool] = True
    """Whether the loss reads the log-probs of the frozen start model. Where it does not, they are never computed."""

    @abstractmethod
    def __call__(self, policy: Pair, reference: Pair | None, lengths: Pair) -> PairLoss:
        """Loss per pair.

        Args:
            policy: summed log-probs of both answers under the policy, in nats.
            reference: the same under the frozen start model; None will do for a loss that does not need it.
            lengths: scored tokens of both answers, at least 1.

        Raises:
            InputError: there is no reference and the loss needs one.
        """

    def required(self, reference: Pair | None) -> Pair:
        """The reference, for a loss that cannot do without.

        Raises:
            InputError: there is none.
        """
        remedy = f"{type(self).__name__} compares with it: give the frozen start model's log-probs."
        require(reference is not None, "reference", None, remedy)
        assert reference is not None
        return reference


@dataclass(frozen=True)
class DPO(PreferenceLoss):
    """Logistic loss on the difference of two implicit rewards.

    `loss = -log σ(β d(c) - β d(r))`, in nats; implicit reward `β d(y)`.

    Length-normalised, as here by default, it is eq. 6 of Tülu 3 (arXiv 2411.15124), the release's `dpo_norm`, with β
    of its table 20. Without, it is eq. 7 of Rafailov et al. 2023 (arXiv 2305.18290).
    """

    beta: float = 5.0
    """Sharpness of the implicit reward. 5 belongs to length-normalised log-probs; summed ones want about 0.1."""
    length_normalised: bool = True
    """Divide each answer's log-ratio by its number of scored tokens."""

    def __post_init__(self) -> None:
        _require_beta(self.beta)

    def __call__(self, policy: Pair, reference: Pair | None, lengths: Pair) -> PairLoss:
        """Loss per pair; see `PreferenceLoss`."""
        ratio = _log_ratio(policy, self.required(reference))
        rewards = _scaled(self.beta, ratio, lengths if self.length_normalised else None)
        return PairLoss(-F.logsigmoid(_margin(rewards)), _detached(rewards))


@dataclass(frozen=True)
class ConservativeDPO(PreferenceLoss):
    """DPO for labels of which a share ε is the wrong way round (Mitchell 2023, "A note on DPO with noisy preferences").

    `loss = -(1 - ε) log σ(m) - ε log σ(-m)` with `m = β d(c) - β d(r)`, in nats; implicit reward `β d(y)`.

    It is smallest at `σ(m) = 1 - ε` and rises again beyond: margins stop growing at `log((1 - ε) / ε)`, which is 2.2 for
    ε = 0.1. With ε = 0 it is `DPO`, whose defaults it has; the note names no β and writes summed log-probs.
    """

    beta: float = 5.0
    """Sharpness of the implicit reward. 5 belongs to length-normalised log-probs; summed ones want about 0.1."""
    label_smoothing: float = 0.1
    """ε: the share of pairs whose labels are taken to be flipped, from 0 to below 0.5."""
    length_normalised: bool = True
    """Divide each answer's log-ratio by its number of scored tokens."""

    def __post_init__(self) -> None:
        _require_beta(self.beta)
        smoothing = self.label_smoothing
        require(0 <= smoothing < 0.5, "loss.label_smoothing", smoothing, "It must be 0 or above and below 0.5.")

    def __call__(self, policy: Pair, reference: Pair | None, lengths: Pair) -> PairLoss:
        """Loss per pair; see `PreferenceLoss`."""
        ratio = _log_ratio(policy, self.required(reference))
        rewards = _scaled(self.beta, ratio, lengths if self.length_normalised else None)
        right_B, flipped_B = -F.logsigmoid(_margin(rewards)), -F.logsigmoid(-_margin(rewards))
        return PairLoss(torch.lerp(right_B, flipped_B, self.label_smoothing), _detached(rewards))


@dataclass(frozen=True)
class IPO(PreferenceLoss):
    """Squared distance of the log-ratio margin from a target (Azar et al. 2023, arXiv 2310.12036, eq. 17).

    `loss = (d(c) - d(r) - 1 / (2β))²`, in nats² (per token² where length-normalised); implicit reward `β d(y)`.

    The margin has a target instead of growing for ever: 5 nats for β = 0.1. The paper's equation has summed log-probs,
    which is the default; some trainers (TRL's `ipo`) average over tokens, and there 1 / (2β) is in nats per token.
    """

    beta: float = 0.1
    """Strength of the pull to the reference: the paper's τ. The larger, the smaller the margin that is aimed at."""
    length_normalised: bool = False
    """Divide each answer's log-ratio by its number of scored tokens."""

    def __post_init__(self) -> None:
        _require_beta(self.beta)

    def __call__(self, policy: Pair, reference: Pair | None, lengths: Pair) -> PairLoss:
        """Loss per pair; see `PreferenceLoss`."""
        ratio = _log_ratio(policy, self.required(reference))
        ratio = _scaled(1.0, ratio, lengths if self.length_normalised else None)
        loss_B = (_margin(ratio) - 1 / (2 * self.beta)).square()
        return PairLoss(loss_B, _detached(_scaled(self.beta, ratio, None)))


@dataclass(frozen=True)
class SimPO(PreferenceLoss):
    """Logistic loss on the policy's own log-probs, without a reference (Meng et al. 2024, arXiv 2405.14734, eq. 6).

    `loss = -log σ(β log π(c) / |c| - β log π(r) / |r| - γ)`, in nats; implicit reward `β log π(y) / |y|`.

    β = 2 and γ = 1 are what the paper trains a Llama 3 8B base with, and the first SimPO row of Tülu 3's table 18, which
    writes γ/β = 0.5; its second row is β = 10, γ/β = 0.3, so γ = 3.
    """

    needs_reference: ClassVar[bool] = False

    beta: float = 2.0
    """Sharpness of the implicit reward."""
    gamma: float = 1.0
    """Margin that the chosen answer's reward has to be ahead by; 0 or above. In units of the reward, so γ and not γ/β."""
    length_normalised: bool = True
    """Divide each answer's log-prob by its number of scored tokens. Off is the paper's ablation of it."""

    def __post_init__(self) -> None:
        _require_beta(self.beta)
        require(0 <= self.gamma < float("inf"), "loss.gamma", self.gamma, "It must be 0 or above, and finite.")

    def __call__(self, policy: Pair, reference: Pair | None, lengths: Pair) -> PairLoss:
        """Loss per pair; see `PreferenceLoss`. The reference is not read."""
        rewards = _scaled(self.beta, policy, lengths if self.length_normalised else None)
        return PairLoss(-F.logsigmoid(_margin(rewards) - self.gamma), _detached(rewards))


@dataclass(frozen=True)
class WPO(PreferenceLoss):
    """DPO with pairs weighted by how likely the policy is to write them (Zhou et al. 2024, arXiv 2406.11827).

    `loss = -w log σ(β d(c) - β d(r))`, in nats; implicit reward `β d(y)`. The weight
    `w = min(1, exp(log π(c) / |c| + log π(r) / |r|))` is the product of both answers' geometric-mean token probabilities;
    no gradient flows through it, and it is per token whatever `length_normalised` says of d.

    This is the weight of the Tülu 3 release's `wpo`. The paper goes on to align it between prompts (eq. 2: each token's
    probability against that of one sampled there), for which sums are not enough: it takes the whole distribution at
    every token. TRL's `use_weighting` does that, so its values differ from these.
    """

    beta: float = 0.01
    """Sharpness of the implicit reward. 0.01, which the authors' released models have, belongs to summed log-probs."""
    length_normalised: bool = False
    """Divide each answer's log-ratio by its number of scored tokens."""

    def __post_init__(self) -> None:
        _require_beta(self.beta)

    def __call__(self, policy: Pair, reference: Pair | None, lengths: Pair) -> PairLoss:
        """Loss per pair; see `PreferenceLoss`."""
        ratio = _log_ratio(policy, self.required(reference))
        rewards = _scaled(self.beta, ratio, lengths if self.length_normalised else None)
        means = _scaled(1.0, _detached(policy), lengths)
        weight_B = torch.exp(means.chosen_B + means.rejected_B).clamp(max=1.0)
        return PairLoss(-weight_B * F.logsigmoid(_margin(rewards)), _detached(rewards))


@torch.no_grad()
def reward_metrics(rewards: Pair, loss_B: Tensor) -> dict[str, Tensor]:
    """What is reported of each pair's rewards and loss, without gradient: the first five of `pair_metrics`."""
    metrics = {
        "loss": loss_B,
        "rewards_chosen": rewards.chosen_B,
        "rewards_rejected": rewards.rejected_B,
        "margin": _margin(rewards),
        "accuracy": (rewards.chosen_B > rewards.rejected_B).to(rewards.chosen_B),
    }
    return {name: values_B.detach() for name, values_B in metrics.items()}


@torch.no_grad()
def pair_metrics(policy: Pair, reference: Pair | None, lengths: Pair, terms: PairLoss) -> dict[str, Tensor]:
    """What a preference step reports of each pair, without gradient.

    Args:
        policy: summed log-probs of both answers under the policy, in nats.
        reference: the same under the frozen start model, or None.
        lengths: scored tokens of both answers.
        terms: what the loss said of the same pairs.

    Returns:
        One tensor of B numbers by name, in this order:

        - `loss`;
        - `rewards_chosen`, `rewards_rejected`, their difference `margin`, and `accuracy`: 1 where the chosen answer has
          the higher reward, else 0 (equal is 0);
        - `logp_chosen`, `logp_rejected`: summed log-probs in nats;
        - `length_chosen`, `length_rejected`: scored tokens;
        - with a reference, `kl_chosen` and `kl_rejected`: log π - log π_ref in nats per token, averaged over the tokens
          of the given answer. It is the estimator k1 of KL(π || π_ref) read on the data's answers. It would estimate
          that KL only on answers sampled from the policy; on the data it shows the drift from the reference on these
          answers, and is below 0 where the policy finds them less likely than the reference did.
    """
    metrics = {
        **reward_metrics(terms.rewards, terms.loss_B),
        "logp_chosen": policy.chosen_B,
        "logp_rejected": policy.rejected_B,
        "length_chosen": lengths.chosen_B,
        "length_rejected": lengths.rejected_B,
    }
    if reference is not None:
        drift = _scaled(1.0, _log_ratio(policy, reference), lengths)
        metrics |= {"kl_chosen": drift.chosen_B, "kl_rejected": drift.rejected_B}
    return {name: values_B.detach() for name, values_B in metrics.items()}


def _require_beta(beta: float) -> None:
    require(0 < beta < float("inf"), "loss.beta", beta, "It must be above 0.")


def _log_ratio(policy: Pair, reference: Pair) -> Pair:
    return Pair(policy.chosen_B - reference.chosen_B, policy.rejected_B - reference.rejected_B)


def _scaled(factor: float, values: Pair, lengths: Pair | None) -> Pair:
    """Times a factor, and per token where lengths are given."""
    if lengths is None:
        return Pair(factor * values.chosen_B, factor * values.rejected_B)
    return Pair(factor * values.chosen_B / lengths.chosen_B, factor * values.rejected_B / lengths.rejected_B)


def _margin(rewards: Pair) -> Tensor:
    return rewards.chosen_B - rewards.rejected_B


def _detached(values: Pair) -> Pair:
    return Pair(values.chosen_B.detach(), values.rejected_B.detach())
