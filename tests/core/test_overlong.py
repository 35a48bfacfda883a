"""A response that was cut earns what its policy says, and enters the loss where it should."""

import pytest

from tulu_lightning.core.overlong import Overlong
from tulu_lightning.errors import InputError

LIMIT = 100
RAMP = Overlong("ramp", ramp_tokens=20, ramp_penalty=4.0)


@pytest.mark.parametrize(
    ("overlong", "score", "length", "stopped", "reward", "trained"),
    [
        # Tülu 3's PPO: -10 whatever was found in the answer; Tülu 3.1's GRPO: 0.
        (Overlong(), 10.0, LIMIT, False, -10.0, True),
        (Overlong(), 0.0, LIMIT, False, -10.0, True),
        (Overlong(), 10.0, LIMIT, True, 10.0, True),  # the stop token is the last one that fits
        (Overlong(), 0.0, 5, True, 0.0, True),
        (Overlong(penalty=0.0), 10.0, LIMIT, False, 0.0, True),
        # Masked: the reward stays, the tokens go.
        (Overlong("mask"), 10.0, LIMIT, False, 10.0, False),
        (Overlong("mask"), 10.0, 50, True, 10.0, True),
        (Overlong("none"), 10.0, LIMIT, False, 10.0, True),
        # Ramp over tokens 81 to 100, down to -4.
        (RAMP, 10.0, 80, True, 10.0, True),
        (RAMP, 10.0, 81, True, 9.8, True),
        (RAMP, 10.0, 90, True, 8.0, True),
        (RAMP, 0.0, 100, True, -4.0, True),
        (RAMP, 10.0, 100, False, 6.0, True),
        (RAMP, 10.0, 60, False, 6.0, True),  # cut early, as by the context's end
    ],
    ids=str,
)
def test_reward_and_training_of_a_response(overlong, score, length, stopped, reward, trained):
    assert overlong.reward(score, length, LIMIT, stopped) == pytest.approx(reward)
    assert overlong.trained(stopped) is trained


def test_dapos_ramp_as_it_is_written():
    """Eq. 13 with L_max 16,384 + 4,096 and L_cache 4,096: 0, then ((L_max - L_cache) - y) / L_cache, then -1."""
    overlong = Overlong("ramp", ramp_tokens=4096)
    for length in (1, 16_384, 16_385, 18_000, 20_480):
        expected = 0.0 if length <= 16_384 else (16_384 - length) / 4096
        assert overlong.reward(0.0, length, 20_480, stopped=True) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"kind": "cut"}, "overlong.kind"),
        ({"penalty": float("nan")}, "overlong.penalty"),
        ({"kind": "ramp", "ramp_tokens": 0}, "overlong.ramp_tokens"),
        ({"kind": "ramp", "ramp_penalty": -1.0}, "overlong.ramp_penalty"),
        ({"kind": "mask", "penalty": 0.0}, "overlong.penalty"),  # not read
        ({"ramp_tokens": 5}, "overlong.ramp_tokens"),
        ({"kind": "none", "ramp_penalty": 2.0}, "overlong.ramp_penalty"),
    ],
    ids=str,
)
def test_settings_that_are_wrong_or_not_read_are_refused(settings, key):
    with pytest.raises(InputError, match=key):
        Overlong(**settings)


def test_the_remedy_names_the_kind_that_would_read_it():
    with pytest.raises(InputError, match=r"Leave it at -10\.0, or use kind penalty"):
        Overlong("mask", penalty=-5.0)


def test_a_ramp_longer_than_a_response_is_refused():
    RAMP.check(LIMIT)
    Overlong("mask").check(10)
    with pytest.raises(InputError, match=r"overlong\.ramp_tokens"):
        RAMP.check(20)
