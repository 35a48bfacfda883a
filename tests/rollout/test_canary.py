"""Canaries on an engine that is only pretended: what they catch, what they say."""

import pytest
import torch

from tulu_lightning.rollout.canary import Tolerance, canaries, prove, tolerance_of
from tulu_lightning.rollout.engine import RefreshError
from tulu_lightning.types import Completion

SEQUENCES = canaries(50, count=3, prompt=20, response=4)


class Engine:
    """Gives token t the log-prob -(t + 1), plus a fault."""

    def __init__(self, given=0.0, sampled=0.0):
        self.given, self.sampled, self.trusted = given, sampled, True

    def logprobs(self, sequences, temperature):
        return [truth(response) / temperature + self.given for _, response in sequences]

    def generate(self, prompts, n, sampling, seed):
        ids = torch.arange(sampling.max_new_tokens)
        logprobs = truth(ids.tolist()) / sampling.temperature + self.sampled
        return [[Completion(ids, logprobs, "length", 1)] for _ in prompts]

    def distrust(self):
        self.trusted = False


def truth(response):
    return -(torch.tensor(response, dtype=torch.float32) + 1)


def own(sequences):
    return [truth(response) for _, response in sequences]


def test_canaries_are_fixed_within_the_vocabulary_and_share_a_prefix():
    assert canaries(50, count=3, prompt=20, response=4) == SEQUENCES
    assert canaries(50, count=3, prompt=20, response=4, seed=1) != SEQUENCES
    assert [(len(prompt), len(response)) for prompt, response in SEQUENCES] == [(20, 4)] * 3
    assert all(0 <= token < 50 for prompt, response in SEQUENCES for token in (*prompt, *response))
    assert len({tuple(prompt[:12]) for prompt, _ in SEQUENCES}) == 1
    assert len({tuple(prompt) for prompt, _ in SEQUENCES}) == 3


def test_equal_sides_are_proved():
    proof = prove(Engine(), own, SEQUENCES, tolerance_of(torch.float32))
    assert proof == (0.0, 0.0, 3 * 4 + 3 * 4)


def test_the_temperature_reaches_both_paths():
    halved = prove(Engine(), lambda s: [x / 2 for x in own(s)], SEQUENCES, tolerance_of(torch.float32), 2.0)
    assert halved.maximum == 0
    with pytest.raises(RefreshError, match="another temperature"):
        prove(Engine(), own, SEQUENCES, tolerance_of(torch.float32), 2.0)


@pytest.mark.parametrize(
    ("engine", "kinds", "suspect"),
    [
        (Engine(given=0.01), ["log-probs of given tokens differ"], "packed copy of a tied head"),
        (Engine(sampled=0.01), ["log-probs of sampled tokens differ"], "prefixes cached with the old weights"),
        (Engine(0.01, 0.01), ["log-probs of given tokens differ", "log-probs of sampled tokens differ"], "tied head"),
        (Engine(given=float("nan")), ["log-probs of given tokens differ"], "tied head"),
        (Engine(sampled=float("-inf")), ["log-probs of sampled tokens differ"], "prefixes"),
    ],
)
def test_a_gap_is_named_with_its_size_and_what_to_suspect(engine, kinds, suspect):
    with pytest.raises(RefreshError, match=suspect) as caught:
        prove(engine, own, SEQUENCES, tolerance_of(torch.float32))
    assert [kind for kind in caught.value.problems if "suspect" not in kind] == kinds
    assert "allowed 0.001 at most" in str(caught.value)
    assert not engine.trusted


def test_tensors_that_differ_are_named_in_the_place_of_suspects():
    with pytest.raises(RefreshError) as caught:
        prove(Engine(0.5), own, SEQUENCES, Tolerance(None, 0.1), differing=lambda: {"not held": ["a.weight"], "x": []})
    assert list(caught.value.problems) == ["not held", "log-probs of given tokens differ"]
    assert "0.5 at most and 0.5 on average, allowed 0.1 on average" in str(caught.value)


def test_bfloat16_is_judged_by_the_mean():
    # One token of 12 off by 0.6 is a mean of 0.05; every token off by 0.4 is not bfloat16's noise.
    class OneOff(Engine):
        def logprobs(self, sequences, temperature):
            first, *rest = super().logprobs(sequences, temperature)
            return [first + torch.tensor([0.6, 0, 0, 0]), *rest]

    assert prove(OneOff(), own, SEQUENCES, tolerance_of(torch.bfloat16)).mean == pytest.approx(0.6 / 24)
    with pytest.raises(RefreshError):
        prove(Engine(0.4, 0.4), own, SEQUENCES, tolerance_of(torch.bfloat16))


def test_sides_that_score_other_tokens_are_no_proof():
    with pytest.raises(ValueError, match="the trainer scored"):
        prove(Engine(), lambda s: own(s)[:-1], SEQUENCES, tolerance_of(torch.float32))
