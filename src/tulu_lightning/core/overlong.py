"""What becomes of a response that was cut at the length limit before it stopped.

"Stopped" is the engine's finish reason. Whatever is chosen, the last value of a cut response is followed by 0 in GAE.
"""

import math
from dataclasses import dataclass
from typing import Literal

from tulu_lightning.core.settings import require, require_kind

__all__ = ["Overlong", "OverlongKind"]

OverlongKind = Literal["penalty", "mask", "ramp", "none"]


@dataclass(frozen=True)
class Overlong:
    """One of four policies; the default is that of Tülu 3's PPO (section 6.2).

    - `penalty`: the reward of a cut response is `penalty`, whatever its verifier said. Tülu 3's PPO: -10. Tülu 3.1's
      GRPO: 0.
    - `ramp`: the last `ramp_tokens` before the limit cost linearly more, up to `ramp_penalty`, added to the reward;
      a cut response pays all of it (DAPO, Yu et al. 2025, arXiv 2503.14476, eq. 13).
    - `mask`: a cut response keeps its reward and is not trained on (DAPO's overlong filtering).
    - `none`: a cut response is treated as any other.

    Raises:
        InputError: an unknown kind, a number out of its range, or a setting that the kind does not read.
    """

    kind: OverlongKind = "penalty"
    penalty: float = -10.0
    """Reward of a cut response, in units of the reward."""
    ramp_tokens: int = 2048
    """Length of the ramp."""
    ramp_penalty: float = 1.0
    """Its depth, in units of the reward, above 0. DAPO's rewards are ±1: scale it with `reward.right`."""

    def __post_init__(self) -> None:
        reads = {"penalty": ("penalty",), "mask": (), "ramp": ("ramp_tokens", "ramp_penalty"), "none": ()}
        require_kind(self, "overlong", reads)
        require(math.isfinite(self.penalty), "overlong.penalty", self.penalty, "Give a finite number.")
        require(self.ramp_tokens >= 1, "overlong.ramp_tokens", self.ramp_tokens, "Use at least 1.")
        depth = self.ramp_penalty
        require(0 < depth < float("inf"), "overlong.ramp_penalty", depth, "It is subtracted: give it above 0.")

    def check(self, max_new_tokens: int) -> None:
        """Refuse a ramp that is longer than a response can be.

        Raises:
            InputError: it would punish every response for its length.
        """
        fits = self.kind != "ramp" or self.ramp_tokens < max_new_tokens
        remedy = f"It must be shorter than a response may be: below rollout.max_new_tokens, {max_new_tokens}."
        require(fits, "overlong.ramp_tokens", self.ramp_tokens, remedy)

    def reward(self, score_reward: float, length: int, max_new_tokens: int, stopped: bool) -> float:
        """Terminal reward of a response.

        Args:
            score_reward: what its verifiers' scores are worth.
            length: its tokens, the stop token included.
            max_new_tokens: the limit at which it would have been cut.
            stopped: whether it ended by itself.

        Example: ramp of 20 tokens and depth 1, limit 100: 80 tokens cost 0, 90 cost 0.5, 100 cost 1.
        """
        if self.kind == "penalty":
            return score_reward if stopped else self.penalty
        if self.kind == "ramp":
            over = (length - (max_new_tokens - self.ramp_tokens)) / self.ramp_tokens if stopped else 1.0
            return score_reward - self.ramp_penalty * min(max(over, 0.0), 1.0)
        return score_reward

    def trained(self, stopped: bool) -> bool:
        """Whether a response's tokens enter the loss, and with it whitening and denominators."""
        return stopped or self.kind != "mask"
