"""From one loss per token to the loss of a step: which tokens count how much, and what the sum is divided by.

Losses are summed with these weights over all micro-batches and ranks and divided once, so no split changes anything.

| kind | a token's weight | divided by | a long response |
|---|---|---|---|
| `token` | 1 | tokens of the batch | counts more, token by token alike (Tülu 3's masked mean, DAPO) |
| `sequence` | 1 / its response's tokens | responses | counts as much as a short one, so its tokens less (GRPO's paper) |
| `constant` | 1 | responses · constant | as `token`, and the step does not depend on the batch's lengths (Dr. GRPO) |
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tulu_lightning.core.settings import require

__all__ = ["Aggregation", "denominator", "token_weights"]

Aggregation = Literal["token", "sequence", "constant"]


def token_weights(lengths_R: Sequence[int], kind: Aggregation) -> Tensor:
    """What each token's loss is multiplied by.

    Args:
        lengths_R: tokens of each response that is trained; they add up to N.
        kind: see the module.

    Returns:
        weight_N, fp32, on the host.

    Example: lengths [1, 2], `sequence`: [1, 0.5, 0.5].
    """
    _require_known(kind)
    lengths = torch.as_tensor(lengths_R, dtype=torch.int64)
    weight_R = 1.0 / lengths if kind == "sequence" else torch.ones(len(lengths))
    return weight_R.repeat_interleave(lengths)


def denominator(kind: Aggregation, tokens: float, responses: float, constant: float) -> float:
    """What the weighted sum of the whole mini-batch, over all ranks, is divided by.

    Args:
        kind: see the module.
        tokens: trained tokens.
        responses: trained responses.
        constant: for `constant`, tokens that a response may have at most: the rollout's limit, as in Dr. GRPO.

    Returns:
        tokens; responses; or responses · constant.
    """
    _require_known(kind)
    if kind == "token":
        return float(tokens)
    return float(responses if kind == "sequence" else responses * constant)


def _require_known(kind: str) -> None:
    known = kind in ("token", "sequence", "constant")
    require(known, "aggregation", repr(kind), "Use 'token', 'sequence' or 'constant'.")
