"""AlpacaEval 2's length-controlled win rate (Dubois et al. 2024): what the judge would prefer at equal lengths.

A logistic regression predicts the judge's preference q from the standardised difference of lengths, the instruction's
difficulty and the model itself,

    logit q = a tanh((len(baseline) - len(answer)) / std) + b difficulty + c,

and the win rate is the mean prediction with the first term taken away. Answers of the baseline that were asked to be brief
or verbose ("gamed", with no term c) take part with a fifth of the weight, half of it each, so that a is not mistaken for
quality. The fit has an L1 penalty whose strength is chosen by five-fold cross-validation, as the authors' code does it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Comparison", "Fit", "choose_strength", "fit_l1", "length_controlled"]

GAMED_WEIGHT = 0.2 / 2
STRENGTHS = tuple(float(value) for value in np.logspace(-4, 4, 10))
FOLDS = 5


class Comparison(NamedTuple):
    """One answer against the baseline's."""

    preference: float
    """Probability that the judge prefers it, in [0, 1]."""
    shorter_by: float
    """Characters of the baseline's answer minus those of this one; of a gamed row, already standardised."""
    difficulty: float
    """Of the instruction, as the authors fitted it over all models."""


class Fit(NamedTuple):
    """A length-controlled win rate and what each comparison contributes to it."""

    win_rate: float
    """In [0, 1]."""
    weights: tuple[float, float, float]
    """a, b and c."""
    influences: tuple[float, ...]
    """`win_rate` plus each comparison's influence on it (first order): their mean is the win rate, and resampling them
    gives its sampling error. A mean of the predictions themselves would not know the error of a, b and c."""


def length_controlled(comparisons: Sequence[Comparison], gamed: Sequence[Comparison]) -> Fit:
    """The win rate at equal lengths.

    Args:
        comparisons: of the model, one an instruction.
        gamed: of the baseline's own brief and verbose answers.

    Raises:
        ValueError: there are no comparisons.
    """
    if not comparisons:
        raise ValueError("there are no comparisons")
    n = len(comparisons)
    shorter = torch.tensor([c.shorter_by for c in comparisons], dtype=torch.float64)
    spread = float(shorter.std()) if n > 1 else 0.0
    own = _features(comparisons, shorter / spread if spread > 0 else torch.zeros(n, dtype=torch.float64), 1.0)
    theirs = _features(gamed, torch.tensor([g.shorter_by for g in gamed], dtype=torch.float64), 0.0)
    features = torch.cat([theirs, own])
    wanted = torch.tensor([c.preference for c in (*gamed, *comparisons)], dtype=torch.float64)
    weight = torch.tensor([GAMED_WEIGHT] * len(gamed) + [1.0] * n, dtype=torch.float64)
    strength = choose_strength(features, wanted, weight)
    weights = fit_l1(features, wanted, weight, strength)
    even = own.clone()
    even[:, 0] = 0
    predicted = torch.sigmoid(even @ weights)
    influence = _influence(features, wanted, weight, strength, weights, even)[len(gamed) :] + predicted
    win_rate = float(predicted.mean())
    influence += win_rate - influence.mean()
    a, b, c = weights.tolist()
    return Fit(win_rate, (a, b, c), tuple(influence.tolist()))


def _features(rows: Sequence[Comparison], shorter: Tensor, own: float) -> Tensor:
    """[rows, 3]: tanh of the standardised length difference, difficulty, whether it is the model's."""
    difficulty = torch.tensor([row.difficulty for row in rows], dtype=torch.float64)
    return torch.stack([torch.tanh(shorter), difficulty, torch.full_like(difficulty, own)], dim=1)


def choose_strength(features: Tensor, wanted: Tensor, weight: Tensor) -> float:
    """The inverse strength of the penalty whose fits predict held-out folds best; the smallest of equals."""
    folds = _folds(len(features))
    losses = []
    for strength in STRENGTHS:
        total = 0.0
        for fold in range(min(FOLDS, len(features))):
            out = folds == fold
            weights = fit_l1(features[~out], wanted[~out], weight[~out], strength)
            scores = features[out] @ weights
            total += float((weight[out] * _loss(scores, wanted[out])).mean())
        losses.append(total)
    return STRENGTHS[int(np.argmin(losses))]


def _folds(n: int) -> Tensor:
    """The fold of each row: dealt out in turn from the last row on, as scikit-learn deals groups of equal size."""
    order = np.argsort(np.full(n, 2))[::-1]
    folds = np.empty(n, dtype=np.int64)
    folds[order] = np.arange(n) % FOLDS
    return torch.from_numpy(folds)


def _loss(scores: Tensor, wanted: Tensor) -> Tensor:
    return torch.nn.functional.softplus(scores) - wanted * scores


def fit_l1(features: Tensor, wanted: Tensor, weight: Tensor, strength: float, steps: int = 100) -> Tensor:
    """Weights w [D] of least |w| + strength * sum of weight * log loss, by proximal Newton steps.

    Args:
        features: [N, D], float64.
        wanted: [N], probabilities.
        weight: [N], of each row.
        strength: inverse of the penalty's.
        steps: at most.
    """
    w = torch.zeros(features.shape[1], dtype=features.dtype)

    def value(at: Tensor) -> float:
        return float(at.abs().sum() + strength * (weight * _loss(features @ at, wanted)).sum())

    for _ in range(steps):
        gradient, hessian = _derivatives(features, wanted, weight, strength, w)
        step = _newton_step(gradient, hessian, w)
        size, here = 1.0, value(w)
        expected = float(gradient @ step + (w + step).abs().sum() - w.abs().sum())
        while value(w + size * step) > here + 0.1 * size * expected + 1e-15 * abs(here) and size > 1e-10:
            size /= 2
        w = w + size * step
        if float(step.abs().max()) < 1e-10:
            break
    return w


def _derivatives(features: Tensor, wanted: Tensor, weight: Tensor, strength: float, w: Tensor) -> tuple[Tensor, Tensor]:
    q = torch.sigmoid(features @ w)
    gradient = strength * features.T @ (weight * (q - wanted))
    hessian = strength * (features * (weight * q * (1 - q))[:, None]).T @ features
    return gradient, hessian + 1e-12 * torch.eye(len(w), dtype=w.dtype)


def _newton_step(gradient: Tensor, hessian: Tensor, w: Tensor, sweeps: int = 200) -> Tensor:
    """The step that minimises the quadratic model plus |w + step|, coordinate by coordinate."""
    g, h, at = gradient.tolist(), hessian.tolist(), w.tolist()
    step = [0.0] * len(at)
    for _ in range(sweeps):
        moved = 0.0
        for i, row in enumerate(h):
            slope = g[i] + sum(row[j] * step[j] for j in range(len(step)))
            centre = at[i] + step[i] - slope / row[i]
            shrunk = max(abs(centre) - 1 / row[i], 0.0) * (1 if centre > 0 else -1)
            moved = max(moved, abs(shrunk - at[i] - step[i]))
            step[i] = shrunk - at[i]
        if moved < 1e-13:
            break
    return torch.tensor(step, dtype=w.dtype)


def _influence(features: Tensor, wanted: Tensor, weight: Tensor, strength: float, w: Tensor, even: Tensor) -> Tensor:
    """What a row's weight changes in the win rate through the fit, times the number of comparisons; [N]."""
    active = w != 0
    if not bool(active.any()):
        return torch.zeros(len(features), dtype=w.dtype)
    q = torch.sigmoid(features @ w)
    _, hessian = _derivatives(features, wanted, weight, strength, w)
    flat = torch.sigmoid(even @ w)
    slope = (even * (flat * (1 - flat))[:, None])[:, active].sum(0)
    turn = torch.linalg.solve(hessian[active][:, active], slope)
    return strength * (features[:, active] @ turn) * weight * (wanted - q)
