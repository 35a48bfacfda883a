"""Advantages without a critic: each response against the others that were sampled from the same prompt.

Four rules behind one call. Whatever the ids of the groups, their sizes and the order of the responses, a response's
advantage depends on its own group's scores alone. Sums are in fp64, and equal scores give exactly 0 (in fp32 a mean
of equal scores may be off by a rounding error, which GRPO's division would blow up).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tulu_lightning.core.settings import require

__all__ = [
    "GRPO",
    "RLOO",
    "Advantage",
    "DrGRPO",
    "GroupAdvantage",
    "ReinforcePlusPlus",
    "dead_groups",
    "signal_share",
]


class Advantage(ABC):
    """What every rule is that turns scores into advantages: a frozen dataclass whose fields are its settings."""

    @property
    @abstractmethod
    def whiten_batch(self) -> bool:
        """Whether the caller has to whiten the advantages over the tokens of the global batch (`core.advantages`)."""


class GroupAdvantage(Advantage):
    """A rule whose baseline is the response's group, so that no critic is needed."""

    @property
    def whiten_batch(self) -> bool:
        """Only where the rule says so."""
        return False

    @abstractmethod
    def __call__(self, scores_R: Tensor, group_R: Tensor) -> Tensor:
        """One advantage per response; each of its tokens gets the same.

        Args:
            scores_R: terminal rewards.
            group_R: int64, any id that the responses of one prompt share; the groups may lie anyhow and differ in size.

        Returns:
            advantages_R, fp32 (fp64 where the scores are).
        """


@dataclass(frozen=True)
class GRPO(GroupAdvantage):
    """`(s - mean) / (std + ε)` over the group (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).

    The deviation is the sample's, divided by n - 1, as in the code that trained Tülu 3.1 (its ε is 1e-8 too) and in TRL.
    A group of one, and one whose scores are all equal, gets 0.

    Example: scores [10, 0, 0, 0]: mean 2.5, std 5, advantages [1.5, -0.5, -0.5, -0.5].
    """

    eps: float = 1e-8
    """ε, in units of the score."""

    def __post_init__(self) -> None:
        require(0 <= self.eps < float("inf"), "advantage.eps", self.eps, "It must be 0 or more.")

    def __call__(self, scores_R: Tensor, group_R: Tensor) -> Tensor:
        """See `GroupAdvantage`."""
        groups = _groups(scores_R, group_R)
        squares_G = groups.sum(groups.centred_R.square())
        std_G = (squares_G / (groups.count_G - 1).clamp(min=1)).sqrt()
        return _result(torch.where(groups.live_R, groups.centred_R / (std_G + self.eps)[groups.index_R], 0.0), scores_R)


@dataclass(frozen=True)
class DrGRPO(GroupAdvantage):
    """`s - mean` over the group (Liu et al. 2025, arXiv 2503.20783): GRPO without the division by the deviation.

    The division weighs prompts up that are nearly always or nearly never solved. The paper's other half is the
    aggregation `constant`. A group of one gets 0.

    Example: scores [10, 0, 0, 0] give [7.5, -2.5, -2.5, -2.5].
    """

    def __call__(self, scores_R: Tensor, group_R: Tensor) -> Tensor:
        """See `GroupAdvantage`."""
        groups = _groups(scores_R, group_R)
        return _result(torch.where(groups.live_R, groups.centred_R, 0.0), scores_R)


@dataclass(frozen=True)
class RLOO(GroupAdvantage):
    """`s` minus the mean of the group's *other* scores (Ahmadian et al. 2024, arXiv 2402.14740).

    It is n / (n - 1) times the centred score, and unbiased: the baseline does not depend on the response itself. A group
    of one has no others and gets 0.

    Example: scores [10, 0, 0, 0]: 10 - 0 and 0 - 10/3.
    """

    def __call__(self, scores_R: Tensor, group_R: Tensor) -> Tensor:
        """See `GroupAdvantage`."""
        groups = _groups(scores_R, group_R)
        scale_G = groups.count_G / (groups.count_G - 1).clamp(min=1)
        return _result(torch.where(groups.live_R, groups.centred_R * scale_G[groups.index_R], 0.0), scores_R)


@dataclass(frozen=True)
class ReinforcePlusPlus(GroupAdvantage):
    """`s - mean` over the group, then whitened over the tokens of the global batch (Hu et al. 2025, arXiv 2501.03262).

    The call returns the centred scores; `whiten_batch` tells the caller to whiten. One deviation for the whole batch
    does not weigh prompts by how hard they are. A group of one keeps its score, whose baseline is then the batch's mean,
    by the whitening: with one sample per prompt this is REINFORCE++ without the group baseline. Do not mix groups of one
    with larger ones.

    Example: scores [10, 0] and [0, 0] give [5, -5, 0, 0], whitened.
    """

    @property
    def whiten_batch(self) -> bool:
        """Yes."""
        return True

    def __call__(self, scores_R: Tensor, group_R: Tensor) -> Tensor:
        """See `GroupAdvantage`; not yet whitened."""
        groups = _groups(scores_R, group_R)
        alone_R = groups.count_G[groups.index_R] == 1
        centred_R = torch.where(groups.live_R, groups.centred_R, 0.0)
        return _result(torch.where(alone_R, scores_R.double(), centred_R), scores_R)


def signal_share(scores_R: Tensor, group_R: Tensor) -> float:
    """Share of the groups whose scores are not all equal: only they teach a rule that compares within a group.

    0 without groups. A group of one counts as all equal.
    """
    ids_G, live_G = _live(scores_R, group_R)[:2]
    return float(live_G.double().mean()) if len(ids_G) else 0.0


def dead_groups(scores_R: Tensor, group_R: Tensor) -> list[int]:
    """Ids of the groups whose scores are all equal, in rising order."""
    ids_G, live_G = _live(scores_R, group_R)[:2]
    return ids_G[~live_G].tolist()


class _Groups(NamedTuple):
    """What all rules need; G is the axis of the groups, in the order of their ids. fp64."""

    index_R: Tensor
    count_G: Tensor
    centred_R: Tensor
    live_R: Tensor
    """bool: the group's scores are not all equal."""

    def sum(self, x_R: Tensor) -> Tensor:
        """Sums over each group."""
        return torch.zeros_like(self.count_G).index_add(0, self.index_R, x_R)


def _groups(scores_R: Tensor, group_R: Tensor) -> _Groups:
    ids_G, live_G, index_R = _live(scores_R, group_R)
    scores_R = scores_R.double()
    zero_G = scores_R.new_zeros(len(ids_G))
    count_G = zero_G.index_add(0, index_R, torch.ones_like(scores_R))
    mean_G = zero_G.index_add(0, index_R, scores_R) / count_G
    return _Groups(index_R, count_G, scores_R - mean_G[index_R], live_G[index_R])


def _live(scores_R: Tensor, group_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids in rising order, whether each group has two different scores, and each response's place among the ids."""
    ids_G, index_R = torch.unique(group_R.to(scores_R.device), return_inverse=True)
    empty_G = scores_R.new_zeros(len(ids_G))
    low_G = empty_G.scatter_reduce(0, index_R, scores_R, "amin", include_self=False)
    high_G = empty_G.scatter_reduce(0, index_R, scores_R, "amax", include_self=False)
    return ids_G, low_G != high_G, index_R


def _result(advantages_R: Tensor, scores_R: Tensor) -> Tensor:
    return advantages_R if scores_R.dtype == torch.float64 else advantages_R.float()
