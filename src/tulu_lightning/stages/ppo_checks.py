"""Settings of PPO that clash, or that would do nothing, refused before anything loads."""

import math
from typing import Any

from tulu_lightning.assets.models import load_tokenizer
from tulu_lightning.core.estimators import GAE, GroupAdvantage
from tulu_lightning.core.settings import require
from tulu_lightning.errors import InputError

__all__ = ["check_critic", "check_settings"]

OTHERS = "or take an advantage of core.groups (GRPO, DrGRPO, RLOO, ReinforcePlusPlus), which has none"


def check_settings(stage: Any) -> None:
    """Refuse combinations of a `PPO`'s settings.

    Raises:
        InputError: a number out of its range; GAE without a critic; a critic, or something of the critic's, beside a
            group's advantage, which reads none; one sample a prompt, or dynamic sampling, where that cannot work; a
            ramp of length that is longer than a response.
    """
    for name in ("epochs", "mini_batches", "micro_tokens"):
        require(getattr(stage, name) >= 1, f"model.{name}", getattr(stage, name), "Use at least 1.")
    remedy = "It must be 0 or more."
    require(0 <= stage.entropy_coefficient < math.inf, "model.entropy_coefficient", stage.entropy_coefficient, remedy)
    known = ("token", "sequence", "constant")
    require(stage.aggregation in known, "model.aggregation", repr(stage.aggregation), f"Use one of {', '.join(known)}.")
    stage.overlong.check(stage.rollout.max_new_tokens)
    if isinstance(stage.advantage, GAE):
        _check_gae(stage)
    else:
        _check_groups(stage)


def _check_gae(stage: Any) -> None:
    if stage.critic_config is None:
        raise InputError(
            "model.critic", "is missing, and GAE needs a critic", f"Give model.init_args.critic, {OTHERS}."
        )
    remedy = "It must be above 0."
    require(0 < stage.value_coefficient < math.inf, "model.value_coefficient", stage.value_coefficient, remedy)
    if stage.dynamic_sampling is not None:
        what = "drops groups of responses, and GAE compares none: its critic is the baseline"
        raise InputError("model.dynamic_sampling", what, f"Leave it out, {OTHERS}.")


def _check_groups(stage: Any) -> None:
    name = type(stage.advantage).__name__
    require(isinstance(stage.advantage, GroupAdvantage), "model.advantage", name, "Use GAE or one of core.groups.")
    idle = {"critic": stage.critic_config, **stage.of_the_critic}
    for key, value in idle.items():
        if value is not None:
            what = f"does nothing: {name} compares responses to one prompt and has no critic"
            raise InputError(f"model.{key}", what, "Leave it out, or set model.init_args.advantage to GAE.")
    if stage.rollout.samples_per_prompt < 2:
        what = f"is {stage.rollout.samples_per_prompt}, and {name} compares the responses to one prompt"
        raise InputError("rollout.samples_per_prompt", what, "Use at least 2; 8 to 16 are usual.")


def check_critic(stage: Any) -> None:
    """Refuse a critic that reads other token ids than the policy.

    Raises:
        InputError: its tokenizer is another one.
    """
    if stage.critic_folder == stage.folder:
        return
    if load_tokenizer(stage.critic_folder).get_vocab() != stage.tokenizer.get_vocab():
        what = f"{stage.critic_folder} has another tokenizer than the policy {stage.folder}"
        remedy = "The critic reads the policy's token ids: give one with the same tokenizer."
        raise InputError("critic.path", what, remedy)
